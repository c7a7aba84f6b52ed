"""Rewards: user code, named `module:function`, run as Ray tasks with a time limit.

A reward is called as `function(reply, **reward_args)` and returns a finite number, by convention in 0..1. One
that raises, hangs or returns something else costs its own event and nothing more.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray

from populace.population.experience.checks import MAX_REWARD
from populace.storage.errors import InvalidInput

START_GRACE_S = 30.0
"""A worker that starts imports the user's module before its clock runs."""

CREDENTIALS = (
    "AWS_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MINIO_ACCESS_KEY",
    "MINIO_SECRET_KEY",
    "POPULACE_MASTER_KEY",
    "POPULACE_SIGNING_KEY",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer, as a reward sees it."""

    messages: tuple[Mapping[str, str], ...]
    text: str
    num_tokens: int
    finished: bool
    """False when it was cut at the token limit."""
    base_logprob: float
    """Mean log-probability of its tokens under the base alone: how likely the base finds this answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRequest:
    """All answers to one task."""

    target: str
    arguments: Mapping[str, Any]
    replies: tuple[Reply, ...]


RewardOutcome = tuple[float, ...] | str
"""A reward per answer, or why there is none."""


def find_reward(target: str) -> Callable[..., float]:
    """The function at `module:function`; `InvalidInput` says what is missing."""
    module_name, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(
            f"reward {target!r} can't be imported: {error}; it must be importable where Populace runs"
        ) from None
    if not callable(function):
        raise InvalidInput(f"reward {target!r} is not a function")
    reward: Callable[..., float] = function
    return reward


def score_replies(request: RewardRequest, timeout_s: float | None = None) -> RewardOutcome:
    """Run the reward here; the user's exception becomes the reason. With `timeout_s`, an alarm interrupts it
    (only in a process's main thread, where a Ray task runs)."""
    try:
        reward = find_reward(request.target)
        with _alarm(timeout_s):
            rewards = tuple(float(reward(reply, **request.arguments)) for reply in request.replies)
    except Exception as error:  # user code: anything can come out of it
        return f"reward {request.target} raised {type(error).__name__}\n{error}"
    if not all(abs(value) <= MAX_REWARD for value in rewards):
        return f"reward {request.target} returned {rewards}; rewards must be finite, by convention 0 to 1"
    return rewards


def score_on_ray(requests: Sequence[RewardRequest], timeout_s: float) -> list[RewardOutcome]:
    """`score_replies` for every request in Ray tasks, as many at a time as there are processors.

    The time limit counts from where the user's code starts. A task that an alarm can't interrupt is killed
    `START_GRACE_S` later; tasks never wait behind it, because they ask Ray for no processor.
    """
    remote = _scoring_task()
    outcomes: list[RewardOutcome] = [""] * len(requests)
    queue = list(range(len(requests)))[::-1]
    running: dict[Any, tuple[int, float]] = {}
    while queue or running:
        while queue and len(running) < max(2, os.cpu_count() or 1):
            index = queue.pop()
            deadline = time.monotonic() + timeout_s + START_GRACE_S
            running[remote.remote(requests[index], timeout_s)] = (index, deadline)
        ready, _ = ray.wait(list(running), num_returns=1, timeout=0.25)
        for reference in ready:
            index, _ = running.pop(reference)
            try:
                outcomes[index] = ray.get(reference)
            except Exception as error:  # the worker died under user code
                outcomes[index] = f"reward task failed: {type(error).__name__}: {error}"
        for reference, (index, deadline) in list(running.items()):
            if time.monotonic() > deadline:
                ray.cancel(reference, force=True)
                del running[reference]
                outcomes[index] = f"reward took longer than {timeout_s} s and was killed"
    return outcomes


@functools.cache
def _scoring_task() -> Any:
    """Made once: Ray keeps every remote function that was ever made, in the driver and in the cluster."""
    # User code: it gets neither the store's credentials nor the population's keys.
    environment = {"env_vars": {**{name: "" for name in CREDENTIALS}, "POPULACE_KEYS": os.devnull}}
    return ray.remote(num_cpus=0, max_retries=0, runtime_env=environment)(score_replies)


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
