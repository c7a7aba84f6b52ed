"""Rewards: user code, named `module:function`. Free of Ray; `reward_tasks.py` runs them there.

A reward is called as `function(reply, **reward_args)` and returns a finite number, by convention in
0..1. One that raises, hangs or returns something else costs its own event and nothing more.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from populace.population.experience.checks import MAX_REWARD
from populace.population.experience.sealing import Reason
from populace.storage.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer, as a reward sees it."""

    messages: tuple[Mapping[str, str], ...]
    text: str
    num_tokens: int
    finished: bool
    """False when it was cut at the token limit."""
    base_logprob: float
    """Mean log-probability of its tokens under the base alone: how likely the base finds this
    answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRequest:
    """All answers to one task."""

    target: str
    arguments: Mapping[str, Any]
    replies: tuple[Reply, ...]


RewardOutcome = tuple[float, ...] | Reason
"""A reward per answer, or why there is none."""


def find_reward(target: str) -> Callable[..., float]:
    """The function at `module:function`; `InvalidInput` says what is missing."""
    module_name, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(
            f"reward {target!r} can't be imported: {error}; it must be importable where Populace "
            "runs"
        ) from None
    if not callable(function):
        raise InvalidInput(f"reward {target!r} is not a function")
    reward: Callable[..., float] = function
    return reward


def score_replies(request: RewardRequest, timeout_s: float | None = None) -> RewardOutcome:
    """Run the reward here; the user's exception becomes the reason. With `timeout_s`, an alarm
    interrupts it (only in a process's main thread, where a Ray task runs)."""
    try:
        reward = find_reward(request.target)
        with _alarm(timeout_s):
            rewards = tuple(float(reward(reply, **request.arguments)) for reply in request.replies)
    except Exception as error:  # user code: anything can come out of it
        text = f"reward {request.target} raised {type(error).__name__}"
        return Reason(text=text, said=str(error))
    if not all(abs(value) <= MAX_REWARD for value in rewards):
        return Reason(
            text=f"reward {request.target} returned {rewards}; rewards must be finite, by "
            "convention 0 to 1"
        )
    return rewards


@contextlib.contextmanager
def _alarm(timeout_s: float | None) -> Iterator[None]:
    if timeout_s is None:
        yield
        return

    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {timeout_s} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
