"""Experience: what users' models learn from. Records and their validation.

An event id identifies an event of its user: the same id sent again with the same content is the same event, with other
content it is an error that the controller settles with that reason. Ids are texts, or integers that increase per user.
Texts are remembered for the last 2**20 events of a partition at least, integers for ever.
"""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NewType

from populace.storage.canonical import canonical_json
from populace.storage.errors import InvalidInput

UserId = NewType("UserId", str)
Messages = tuple[Mapping[str, str], ...]
"""Chat messages, each with `role` and `content`, in the order of the conversation."""

MAX_USER_BYTES = 256
MAX_EVENT_ID_BYTES = 256
MAX_REWARD = 1e6
"""Rewards are by convention 0..1; beyond this their arithmetic is no longer safe in fp32."""
MIN_LOGPROB = -1e4


def _new_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something to try: the policy answers `prompt` several times, `reward` scores each answer in 0..1."""

    prompt: str | Messages
    reward: str
    """Name of a registered reward."""
    reward_args: Mapping[str, Any] = field(default_factory=dict)
    """JSON values handed to the reward with each answer."""
    event_id: str | int = field(default_factory=_new_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """An answer that happened and what it was worth."""

    prompt: str | Messages
    completion: str
    reward: float
    revision: int = 0
    """The adapter's revision that produced it."""
    completion_ids: Sequence[int] = ()
    """Token ids of `completion`; required when `logprobs` or `expert_ids` are given."""
    logprobs: Sequence[float] = ()
    """Natural log-probability of each completion token when it was sampled."""
    expert_ids: Sequence[Sequence[Sequence[int]]] = ()
    """[token][layer][k] experts that each completion token was routed to; -1 where unknown."""
    event_id: str | int = field(default_factory=_new_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """An answer to imitate."""

    prompt: str | Messages
    completion: str
    event_id: str | int = field(default_factory=_new_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """A command: move tip and serving of this user to revision `to`."""

    to: int
    event_id: str | int = field(default_factory=_new_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A command: keep revision `revision` whatever the retention rule says, or no longer."""

    revision: int
    pinned: bool
    event_id: str | int = field(default_factory=_new_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """A command: forget this user."""

    event_id: str | int = field(default_factory=_new_id)


Experience = Task | Trajectory | Demonstration
Command = Rollback | Pin | Forget
LogEvent = Experience | Command
_KINDS: dict[str, type[Any]] = {
    "task": Task,
    "trajectory": Trajectory,
    "demonstration": Demonstration,
    "rollback": Rollback,
    "pin": Pin,
    "forget": Forget,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def kind_of(event: LogEvent) -> str:
    return _NAMES[type(event)]


def check_user(user: str) -> UserId:
    """`user` as a `UserId`, or `InvalidInput`."""
    if not isinstance(user, str) or not user or not _is_utf8(user):
        raise InvalidInput(f"user is {user!r}; give a non-empty string")
    if (size := len(user.encode())) > MAX_USER_BYTES:
        raise InvalidInput(f"user {user[:24]!r}… has {size} bytes; at most {MAX_USER_BYTES} are allowed")
    return UserId(user)


def check_event(event: LogEvent, rewards: Mapping[str, str] | None) -> None:
    """Raises `InvalidInput` naming the event, field, value and way out. `rewards`: the registered ones; None: any."""
    where = f"event {getattr(event, 'event_id', '?')!r}"
    if type(event) not in _NAMES:
        raise InvalidInput(f"{event!r} is not an event; use Task, Trajectory or Demonstration")
    event_id: object = event.event_id
    if _is_integer(event_id):
        if not 0 <= event_id < 2**63:  # type: ignore[operator]
            raise InvalidInput(f"{where}: an integer event_id counts up from 0, below 2**63")
    elif (
        not isinstance(event_id, str) or not _is_utf8(event_id) or not 0 < len(event_id.encode()) <= MAX_EVENT_ID_BYTES
    ):
        raise InvalidInput(f"{where}: event_id needs 1 to {MAX_EVENT_ID_BYTES} bytes of text, or an integer")
    if isinstance(event, Command):
        method = kind_of(event)
        raise InvalidInput(f"{where}: a {method} is a command, not experience; use Population.{method}")
    check_prompt(where, event.prompt)
    match event:
        case Task():
            if (
                not isinstance(event.reward, str)
                or not event.reward
                or (rewards is not None and event.reward not in rewards)
            ):
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
                raise InvalidInput(f"{where}: reward_args are not JSON ({error}); use plain values") from None
        case Trajectory():
            _check_completion(where, event.completion)
            if not is_number(event.reward) or not abs(event.reward) <= MAX_REWARD:
                raise InvalidInput(f"{where}: reward is {event.reward!r}; give a finite number, by convention 0 to 1")
            if not _is_integer(event.revision) or event.revision < 0:
                raise InvalidInput(f"{where}: revision is {event.revision!r}; revisions start at 0")
            _check_lengths(where, event)
        case Demonstration():
            _check_completion(where, event.completion)


def messages_of(prompt: str | Messages) -> list[dict[str, str]]:
    """A prompt as chat messages; a plain string is one message of the user."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def encode_event(event: LogEvent) -> dict[str, Any]:
    """An event as JSON values."""
    body = {name: getattr(event, name) for name in event.__dataclass_fields__ if name != "event_id"}
    if "prompt" in body:
        body["prompt"] = messages_of(body["prompt"])
    return {"event_id": event.event_id, "kind": kind_of(event), "body": body}


def event_bytes(event: LogEvent) -> bytes:
    """An event as it is sealed; `InvalidInput` for values that JSON or UTF-8 can't hold."""
    try:
        return canonical_json(encode_event(event))
    except (TypeError, ValueError) as error:  # NumPy arrays, lone surrogates
        raise InvalidInput(f"event {event.event_id!r} can't be stored: {error}; use plain values") from None


def decode_event(encoded: Mapping[str, Any]) -> LogEvent:
    body = dict(encoded["body"])
    if "prompt" in body:
        body["prompt"] = tuple(body["prompt"])
    event: LogEvent = _KINDS[encoded["kind"]](event_id=str(encoded["event_id"]), **body)
    return event


def is_held_out(event_id: str, population_key: bytes, share: float) -> bool:
    """Whether a task is kept for evaluation: a keyed hash of its id, so that neither order nor repetition can
    change the answer."""
    digest = hashlib.blake2b(event_id.encode(), key=population_key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def check_prompt(where: str, prompt: str | Messages) -> None:
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


def _check_completion(where: str, completion: str) -> None:
    if not isinstance(completion, str) or not completion:
        raise InvalidInput(f"{where}: completion is {completion!r}; give a non-empty text")


def _check_lengths(where: str, event: Trajectory) -> None:
    if not any(getattr(event, name) != () for name in ("completion_ids", "logprobs", "expert_ids")):
        return  # most have none, and checks take time
    for name in ("completion_ids", "logprobs", "expert_ids"):
        if not isinstance(getattr(event, name), Sequence) or isinstance(getattr(event, name), str):
            raise InvalidInput(f"{where}: {name} is {getattr(event, name)!r}; give a list")
    num_tokens = len(event.completion_ids)
    if not all(_is_integer(token) and 0 <= token < 2**31 for token in event.completion_ids):
        raise InvalidInput(f"{where}: completion_ids must be token ids, integers from 0 up")
    for name in ("logprobs", "expert_ids"):
        given = len(getattr(event, name))
        if given and given != num_tokens:
            raise InvalidInput(
                f"{where}: {name} has {given} entries for {num_tokens} completion_ids; give one per token"
            )
    if not all(is_number(value) and MIN_LOGPROB <= value <= 0 for value in event.logprobs):
        raise InvalidInput(f"{where}: logprobs must be natural logarithms, finite and at most 0")
    try:
        shapes = {(len(layers), *sorted({len(ids) for ids in layers})) for layers in event.expert_ids}
        known = all(_is_integer(k) and -1 <= k < 2**31 for layers in event.expert_ids for ids in layers for k in ids)
    except TypeError:
        shapes, known = set(), False
    if not known or len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
        raise InvalidInput(
            f"{where}: expert_ids must be [token][layer][k] integers from -1 up, with the same shape for every token"
        )


def is_number(value: object) -> bool:
    """Whether `value` is a plain finite number."""
    return isinstance(value, (int, float)) and abs(value) < 1e300 and math.isfinite(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
