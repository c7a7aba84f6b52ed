"""Every noun of a wave, one row per member."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from populace.population.experience.events import UserId
from populace.population.experience.sealing import LoggedEvent
from populace.population.waves.rollouts import Rollout
from populace.storage.catalog.states import AdapterState
from populace.storage.log.records import (
    EventRef,
    Failed,
    Position,
    Record,
    RecordHeader,
    Settled,
    SettledEvent,
)
from populace.workers.batch import AdapterKey, AdapterRef, Paging, RolloutRequest, TrainGroup


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


def wave_of(members: Iterable[WaveMember]) -> Wave:
    """A wave under a name that only this set of adapters and events can have."""
    members = tuple(members)
    digest = hashlib.blake2b(digest_size=12)
    for member in members:
        digest.update(f"{member.pseudonym}:{member.consumed};".encode())
    return Wave(wave_id=digest.hexdigest(), members=members)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWave:
    """A wave whose attempt is logged."""

    wave: Wave
    adapters: dict[str, AdapterState]
    prepared: tuple[Prepared, ...]
    refs: tuple[AdapterRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """`records` grows while it is being written: what is in it has landed, whatever becomes of the
    rest."""

    written: Future[None]
    records: list[tuple[RecordHeader, Record]]
    renamed: list[tuple[AdapterKey, AdapterKey]]
    """Slots whose content is another revision once everything is written."""
    pseudonyms: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RollingWave:
    """A wave whose rollouts are under way, or done."""

    planned: PlannedWave
    rollouts: Future[list[Rollout]]
    paging: list[Paging]
    """One, once the adapters are hot."""


REASONS_WITHOUT_UPDATE = {"no_signal": "no signal", "non_finite": "gradient not finite"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberOutcome:
    """A prefix of the member's events is accounted for; it ends before the first one that failed
    and may be tried again."""

    member: WaveMember
    groups: tuple[TrainGroup, ...]
    trained: tuple[EventRef, ...]
    """What `groups` were made from."""
    settled: tuple[SettledEvent, ...]
    consumed: Position | None
    """None: nothing is accounted for."""
    failed: Failed | None

    def without_update(self, status: str) -> Settled | None:
        """The record of a user whose events end without a revision; None if none does."""
        if self.consumed is None:
            return None
        rest = [
            SettledEvent(event=ref, reason=REASONS_WITHOUT_UPDATE[status]) for ref in self.trained
        ]
        return Settled(
            pseudonym=self.member.pseudonym, events=[*self.settled, *rest], consumed=self.consumed
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One adapter's events, sorted by what has to happen to them."""

    adapter: AdapterKey
    requests: tuple[RolloutRequest, ...]
    groups: dict[str, TrainGroup]
    """Event id -> group, for logged events."""
    settled: tuple[SettledEvent, ...]
