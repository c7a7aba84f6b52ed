"""Validation of what comes from outside: nothing is written unless all of it passes. Every error
names the event, the field, its value and the way out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from populace.population.experience.events import (
    EXPERIENCE_KINDS,
    KIND_NAMES,
    Command,
    Demonstration,
    LogEvent,
    Messages,
    Task,
    Trajectory,
    UserId,
    event_bytes,
    kind_of,
)
from populace.storage.canonical import canonical_json
from populace.storage.errors import InvalidInput

MAX_USER_BYTES = 256
MAX_EVENT_ID_BYTES = 256
MAX_REWARD = 1e6
"""Rewards are by convention 0..1; beyond this their arithmetic is no longer safe in fp32."""
MIN_LOGPROB = -1e4


class CheckedEvent(NamedTuple):
    """An event that passed every check, as it is sealed."""

    event_id: str
    plain: bytes

    @staticmethod
    def of(event: LogEvent) -> CheckedEvent:
        """An event that needs no check: one of ours, such as a command."""
        return CheckedEvent(str(event.event_id), event_bytes(event))


def check_events(
    pairs: Iterable[tuple[str, Iterable[LogEvent]]], rewards: Mapping[str, str] | None
) -> dict[str, list[CheckedEvent]]:
    """User -> events ready to be sealed; `InvalidInput` at the first that can't be."""
    checked: dict[str, list[CheckedEvent]] = {}
    for user, events in pairs:
        check_user(user)
        if not isinstance(events, Iterable):
            raise InvalidInput(f"events of user {user!r} are {events!r}; give a list of events")
        own = checked.setdefault(user, [])
        for event in events:
            check_event(event, rewards)
            own.append(CheckedEvent.of(event))
    return checked


def check_user(user: str) -> UserId:
    """`user` as a `UserId`, or `InvalidInput`."""
    if not isinstance(user, str) or not user or not _is_utf8(user):
        raise InvalidInput(f"user is {user!r}; give a non-empty string")
    if (size := len(user.encode())) > MAX_USER_BYTES:
        raise InvalidInput(
            f"user {user[:24]!r}… has {size} bytes; at most {MAX_USER_BYTES} are allowed"
        )
    return UserId(user)


def check_event(event: LogEvent, rewards: Mapping[str, str] | None) -> None:
    """Raises `InvalidInput` for an event that can't be stored or learned from. `rewards`: the
    registered ones; None: any."""
    where = f"event {getattr(event, 'event_id', '?')!r}"
    if type(event) not in KIND_NAMES:
        *most, last = (kind.__name__ for kind in EXPERIENCE_KINDS.values())
        raise InvalidInput(f"{event!r} is not an event; use {', '.join(most)} or {last}")
    _check_id(where, event.event_id)
    if isinstance(event, Command):
        method = kind_of(event)
        raise InvalidInput(
            f"{where}: a {method} is a command, not experience; use Population.{method}"
        )
    check_prompt(where, event.prompt)
    CHECKS[type(event)](where, event, rewards)


def check_prompt(where: str, prompt: str | Messages) -> None:
    """Raises `InvalidInput` for what is no text and no conversation; `where` begins the error."""
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidInput(f"{where}: prompt is empty; give a text or a list of messages")
        return
    if not isinstance(prompt, Sequence) or not prompt:
        raise InvalidInput(f"{where}: prompt has no messages; give a text or at least one message")
    for message in prompt:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InvalidInput(f"{where}: message {message!r}; each needs exactly role and content")
        if not isinstance(message["content"], str):
            raise InvalidInput(f"{where}: message content is {message['content']!r}; give a text")
        if message["role"] not in ("system", "user", "assistant"):
            raise InvalidInput(f"{where}: role {message['role']!r}; use system, user or assistant")


def is_number(value: object) -> bool:
    """Whether `value` is a plain finite number."""
    return isinstance(value, (int, float)) and abs(value) < 1e300 and math.isfinite(value)


def _check_id(where: str, event_id: object) -> None:
    if _is_integer(event_id):
        if not 0 <= event_id < 2**63:  # type: ignore[operator]
            raise InvalidInput(f"{where}: an integer event_id counts up from 0, below 2**63")
        return
    is_text = isinstance(event_id, str) and _is_utf8(event_id)
    if not is_text or not 0 < len(str(event_id).encode()) <= MAX_EVENT_ID_BYTES:
        raise InvalidInput(
            f"{where}: event_id needs 1 to {MAX_EVENT_ID_BYTES} bytes of text, or an integer"
        )


def _check_task(where: str, event: Task, rewards: Mapping[str, str] | None) -> None:
    is_named = isinstance(event.reward, str) and bool(event.reward)
    if not is_named or (rewards is not None and event.reward not in rewards):
        known = ", ".join(sorted(rewards or ())) or "none"
        raise InvalidInput(
            f"{where}: reward {event.reward!r} is not registered; known: {known}. "
            "Add it to rewards.functions as module:function"
        )
    try:
        if not all(isinstance(name, str) for name in event.reward_args):
            raise TypeError("names must be strings")
        canonical_json(dict(event.reward_args))
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"{where}: reward_args are not JSON ({error}); use plain values"
        ) from None


def _check_trajectory(where: str, event: Trajectory, rewards: Mapping[str, str] | None) -> None:
    _check_completion(where, event.completion)
    if not is_number(event.reward) or not abs(event.reward) <= MAX_REWARD:
        raise InvalidInput(
            f"{where}: reward is {event.reward!r}; give a finite number, by convention 0 to 1"
        )
    if not _is_integer(event.revision) or event.revision < 0:
        raise InvalidInput(f"{where}: revision is {event.revision!r}; revisions start at 0")
    _check_lengths(where, event)


def _check_demonstration(
    where: str, event: Demonstration, rewards: Mapping[str, str] | None
) -> None:
    _check_completion(where, event.completion)


CHECKS: dict[type[Any], Callable[[str, Any, Mapping[str, str] | None], None]] = {
    Task: _check_task,
    Trajectory: _check_trajectory,
    Demonstration: _check_demonstration,
}
"""Kind of experience -> what its own fields must be; (where, event, registered rewards)."""


def _check_completion(where: str, completion: str) -> None:
    if not isinstance(completion, str) or not completion:
        raise InvalidInput(f"{where}: completion is {completion!r}; give a non-empty text")


def _check_lengths(where: str, event: Trajectory) -> None:
    """Token ids, log-probabilities and expert ids: one per token, of the right shape."""
    names = ("completion_ids", "logprobs", "expert_ids")
    if not any(getattr(event, name) != () for name in names):
        return  # most have none, and checks take time
    for name in names:
        value = getattr(event, name)
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise InvalidInput(f"{where}: {name} is {value!r}; give a list")
    num_tokens = len(event.completion_ids)
    if not all(_is_integer(token) and 0 <= token < 2**31 for token in event.completion_ids):
        raise InvalidInput(f"{where}: completion_ids must be token ids, integers from 0 up")
    for name in ("logprobs", "expert_ids"):
        given = len(getattr(event, name))
        if given and given != num_tokens:
            raise InvalidInput(
                f"{where}: {name} has {given} entries for {num_tokens} completion_ids; give one "
                "per token"
            )
    if not all(is_number(value) and MIN_LOGPROB <= value <= 0 for value in event.logprobs):
        raise InvalidInput(f"{where}: logprobs must be natural logarithms, finite and at most 0")
    if not _is_rectangular(event.expert_ids):
        raise InvalidInput(
            f"{where}: expert_ids must be [token][layer][k] integers from -1 up, with the same "
            "shape for every token"
        )


def _is_rectangular(expert_ids: Sequence[Sequence[Sequence[int]]]) -> bool:
    try:
        shapes = {(len(layers), *sorted({len(ids) for ids in layers})) for layers in expert_ids}
        are_ids = all(
            _is_integer(k) and -1 <= k < 2**31
            for layers in expert_ids
            for ids in layers
            for k in ids
        )
    except TypeError:
        return False
    return are_ids and len(shapes) <= 1 and all(len(shape) == 2 for shape in shapes)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
