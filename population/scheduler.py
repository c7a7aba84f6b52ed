"""Who is updated next: a pure function of what is pending.

A user's events are consumed in the order in which they arrived, so a user's share of a wave is always a prefix
of what is pending. Users wait in one line; who was served and has more goes to its end, so a user with
a million events delays the others no more than one with two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from populace.population.experience import UserId
from populace.population.stream import LoggedEvent, UserQueue
from populace.storage.records import Position, SettledEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one wave may take."""

    max_adapters: int
    events_per_update: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveMember:
    """One adapter's share of a wave."""

    user: UserId
    pseudonym: str
    partition: int
    events: tuple[LoggedEvent, ...]
    rejected: tuple[SettledEvent, ...]
    """Events in the same prefix that are settled without a try."""

    @property
    def consumed(self) -> Position:
        """Everything of this user up to here is accounted for once the wave commits."""
        positions = [event.ref.position for event in self.events]
        return max(positions + [item.event.position for item in self.rejected])


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """The adapters that one fused step updates. No adapter is in it twice."""

    wave_id: str
    members: tuple[WaveMember, ...]


def form_wave(queues: Iterable[UserQueue], budget: Budget, alone: frozenset[str] = frozenset()) -> Wave | None:
    """The next wave, or None when nobody has anything. A user in `alone` (its last attempt died with its
    controller) is tried by itself, one event at a time, so that a poisonous event stops nobody else."""
    waiting = sorted((queue for queue in queues if queue.is_waiting), key=lambda queue: queue.waiting_since)
    if not waiting:
        return None
    suspects = [queue for queue in waiting if queue.pseudonym in alone]
    if suspects:
        members: tuple[WaveMember, ...] = (_member(suspects[0], 1),)
    else:
        members = tuple(_member(queue, budget.events_per_update) for queue in waiting[: budget.max_adapters])
    return Wave(wave_id=_wave_id(members), members=members)


def _member(queue: UserQueue, num_events: int) -> WaveMember:
    events = tuple(queue.pending[:num_events])
    # A rejected event settles with the prefix it lies in; behind the last pending event nothing is in its way.
    drained = len(events) == len(queue.pending)
    rejected = tuple(
        SettledEvent(event=item.ref, reason=reason)
        for item, reason in queue.rejected
        if drained or item.ref.position < events[-1].ref.position
    )
    return WaveMember(
        user=queue.user,
        pseudonym=queue.pseudonym,
        partition=queue.partition,
        events=events,
        rejected=rejected,
    )


def _wave_id(members: Iterable[WaveMember]) -> str:
    """A name that only this set of adapters and events can have."""
    digest = hashlib.blake2b(digest_size=12)
    for member in members:
        digest.update(f"{member.pseudonym}:{member.consumed};".encode())
    return digest.hexdigest()
