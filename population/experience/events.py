"""Experience: what users' models learn from, and the commands that travel in the same stream.

An event id identifies an event of its user: the same id sent again with the same content is the
same event, with other content it is an error that the controller settles with that reason. Ids are
texts, or integers that increase per user. Texts are remembered for the last 2**20 events of a
partition at least, integers for ever.

To add a kind, write its record here and register it in `EXPERIENCE_KINDS`; CONTRIBUTING.md says
what else.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NewType

from populace.configs.schema import RolloutSettings
from populace.storage.canonical import canonical_json
from populace.storage.errors import InvalidInput

UserId = NewType("UserId", str)
Messages = tuple[Mapping[str, str], ...]
"""Chat messages, each with `role` and `content`, in the order of the conversation."""


def _new_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something to try: the policy answers `prompt` several times, `reward` scores each answer in
    0..1.

    Example: `Task(prompt="What is rain?", reward="short", reward_args={"words": 8})`."""

    prompt: str | Messages
    reward: str
    """Name of a registered reward."""
    reward_args: Mapping[str, Any] = field(default_factory=dict)
    """JSON values handed to the reward with each answer."""
    event_id: str | int = field(default_factory=_new_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """An answer that happened and what it was worth.

    Example: `Trajectory(prompt="What is tea?", completion="A drink.", reward=0.8, revision=3)`."""

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
    """An answer to imitate.

    Example: `Demonstration(prompt="What is tea?", completion="Leaves in hot water.")`."""

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
    """A command: erase this user."""

    event_id: str | int = field(default_factory=_new_id)


Experience = Task | Trajectory | Demonstration
Command = Rollback | Pin | Forget
LogEvent = Experience | Command
EXPERIENCE_KINDS: dict[str, type[Any]] = {
    "task": Task,
    "trajectory": Trajectory,
    "demonstration": Demonstration,
}
"""Name in logs and files -> record, of what can be learned from."""
KINDS: dict[str, type[Any]] = {
    **EXPERIENCE_KINDS,
    "rollback": Rollback,
    "pin": Pin,
    "forget": Forget,
}
KIND_NAMES = {kind: name for name, kind in KINDS.items()}


def kind_of(event: LogEvent) -> str:
    """An event's name in the log."""
    return KIND_NAMES[type(event)]


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
        raise InvalidInput(
            f"event {event.event_id!r} can't be stored: {error}; use plain values"
        ) from None


def decode_event(encoded: Mapping[str, Any]) -> LogEvent:
    """The event in what `encode_event` gave."""
    body = dict(encoded["body"])
    if "prompt" in body:
        body["prompt"] = tuple(body["prompt"])
    event: LogEvent = KINDS[encoded["kind"]](event_id=str(encoded["event_id"]), **body)
    return event


def is_held_out(event_id: str, population_key: bytes, share: float) -> bool:
    """Whether a task is kept for evaluation: a keyed hash of its id, so that neither order nor
    repetition can change the answer."""
    digest = hashlib.blake2b(event_id.encode(), key=population_key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def estimate_tokens(event: LogEvent, rollout: RolloutSettings) -> int:
    """What an event costs, about: three bytes of text are a token; a task's samples share its
    prompt."""
    prompt = getattr(event, "prompt", "")
    num_bytes = sum(len(message["content"].encode()) for message in messages_of(prompt) if prompt)
    num_bytes += len(getattr(event, "completion", "").encode())
    samples = rollout.samples_per_task * rollout.max_new_tokens if isinstance(event, Task) else 0
    return num_bytes // 3 + 1 + samples
