"""The nouns of a wave, one row per member at every stage.

    WaveMember -> PlannedMember -> MemberOutcome -> TrainedMember      what is known of one user
                  PlannedWave -> RollingWave ---- > TrainedWave        all of them together

Every row holds the one before it, so that nothing has to be matched by its place in a list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from populace.population.experience.events import UserId
from populace.population.experience.sealing import LoggedEvent, Reason, Settlement
from populace.storage.catalog.states import AdapterState
from populace.storage.log.records import (
    NO_SIGNAL,
    NOT_FINITE,
    EventRef,
    Failed,
    Position,
    SettledEvent,
)
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    AdapterRef,
    AdapterUpdate,
    Floats,
    Paging,
    RolloutGroup,
    RolloutRequest,
    StepResult,
    TrainGroup,
    UpdateStatus,
    WaveBatch,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveMember:
    """A user who was chosen, with the next events of the user's stream.

    Example: `WaveMember(user="ada", pseudonym="3f…", partition=2, events=(logged,), rejected=())`.
    """

    user: UserId
    pseudonym: str
    partition: int
    events: tuple[LoggedEvent, ...]
    rejected: tuple[Settlement, ...]
    """Events between these that are settled without a try."""

    @property
    def consumed(self) -> Position:
        """Everything of this user up to here is accounted for once the wave commits."""
        positions = [event.ref.position for event in self.events]
        return max(positions + [item.logged.ref.position for item in self.rejected])


def wave_id_of(members: Iterable[WaveMember]) -> str:
    """A name that only this set of adapters and events can have: 96 bits, hex."""
    digest = hashlib.blake2b(digest_size=12)
    for member in members:
        digest.update(f"{member.pseudonym}:{member.consumed};".encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedEvent:
    """An event and what there is to do with it: to roll out, to train on as it is, or nothing."""

    logged: LoggedEvent
    next: RolloutRequest | TrainGroup | Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMember:
    """A member whose attempt is logged: its adapter exists, and its events are prepared."""

    member: WaveMember
    adapter: AdapterState
    """The adapter when the wave was planned; nobody else changes it until the wave ends."""
    ref: AdapterRef
    """Where the bytes of the tip are, which the wave starts from."""
    events: tuple[PreparedEvent, ...]

    @property
    def key(self) -> AdapterKey:
        return self.ref.key

    @property
    def requests(self) -> list[RolloutRequest]:
        """What is to be rolled out for this member."""
        return [item.next for item in self.events if isinstance(item.next, RolloutRequest)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWave:
    """The adapters that one fused step is going to update. No adapter is in it twice."""

    wave_id: str
    members: tuple[PlannedMember, ...]

    @property
    def pseudonyms(self) -> list[str]:
        return [planned.member.pseudonym for planned in self.members]

    @property
    def refs(self) -> list[AdapterRef]:
        return [planned.ref for planned in self.members]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A group of samples, and their log-probabilities under the base alone, [C] each."""

    group: RolloutGroup
    base_logprobs: tuple[Floats, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledOut:
    """What the workers say after a wave's adapters were paged in and its tasks rolled out."""

    paging: Paging
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RollingWave:
    """A wave whose rollouts are under way, or done."""

    planned: PlannedWave
    rolled: Future[RolledOut]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberOutcome:
    """What becomes of a member's events: a prefix of them is accounted for. It ends before the
    first one that failed and may be tried again."""

    planned: PlannedMember
    groups: tuple[TrainGroup, ...]
    trained: tuple[EventRef, ...]
    """What `groups` were made from."""
    settled: tuple[Settlement, ...]
    consumed: Position | None
    """None: nothing is accounted for."""
    failed: Failed | None


def batch_of(outcomes: Sequence[MemberOutcome]) -> WaveBatch:
    """What the workers train on."""
    return WaveBatch(
        adapters=tuple(
            AdapterBatch(adapter=outcome.planned.key, groups=outcome.groups) for outcome in outcomes
        )
    )


REASONS_WITHOUT_UPDATE = {
    UpdateStatus.NO_SIGNAL: NO_SIGNAL,
    UpdateStatus.NON_FINITE: NOT_FINITE,
}
"""Status of an update -> what settles its events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedMember:
    """A member after the fused step: what is to be published."""

    outcome: MemberOutcome
    update: AdapterUpdate

    @property
    def planned(self) -> PlannedMember:
        return self.outcome.planned

    @property
    def is_updated(self) -> bool:
        """Whether there is a new revision; without one the events are settled."""
        return self.update.status is UpdateStatus.UPDATED

    @property
    def unlearned(self) -> list[SettledEvent]:
        """Events that were to be trained on and end without a revision; none if there is one."""
        if self.is_updated:
            return []
        reason = REASONS_WITHOUT_UPDATE[self.update.status]
        return [SettledEvent(event=ref, reason=reason) for ref in self.outcome.trained]

    @property
    def renamed(self) -> tuple[AdapterKey, AdapterKey]:
        """What its slot held, and what it holds once the new revision is committed."""
        adapter = self.planned.adapter
        return self.planned.key, AdapterKey(adapter.pseudonym, adapter.next_revision)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedWave:
    """A wave after its fused step."""

    wave_id: str
    members: tuple[TrainedMember, ...]
    num_rows: int
    """Rows that went through the base in the step, prompts and padding included."""
    out_of_route: tuple[int, int]
    """See `StepResult.out_of_route`."""

    @staticmethod
    def of(wave_id: str, outcomes: Sequence[MemberOutcome], result: StepResult) -> TrainedWave:
        """Each member with its own update, found by the adapter's key."""
        updates = {update.adapter: update for update in result.updates}
        members = tuple(
            TrainedMember(outcome=outcome, update=updates[outcome.planned.key])
            for outcome in outcomes
        )
        return TrainedWave(
            wave_id=wave_id,
            members=members,
            num_rows=result.num_rows,
            out_of_route=result.out_of_route,
        )
