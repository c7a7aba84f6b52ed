"""Forms waves: what may have killed a controller goes first, in small waves or alone; then whose
turn it is.

    suspects, or form_wave over the pending index -> the users' next events -> attempt logged ->
    tokens and requests

An attempt is in the log before anything of it is tried, so that an event that kills the controller
is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from populace.configs.schema import Settings
from populace.population.experience.events import Trajectory, UserId
from populace.population.experience.sealing import Reason, Settlement
from populace.population.experience.states import REASONS, EventState
from populace.population.ledger.ledger import Ledger
from populace.population.waves.prepare import Preparation, prepare_event
from populace.population.waves.scheduler import Served, form_wave
from populace.population.waves.suspects import SUSPECTS_SHARE, Suspects
from populace.population.waves.wave import PlannedMember, PlannedWave, WaveMember, wave_id_of
from populace.storage.log.records import AdapterCreated, Attempt, Record
from populace.workers.layout import layout_of
from populace.workers.shapes import AdapterSpec, BaseDims

if TYPE_CHECKING:
    from populace.population.waves.chat import Chat


class Planner:
    """Plans the waves of the partitions that `ledger` owns."""

    def __init__(self, settings: Settings, ledger: Ledger, chat: Chat, dims: BaseDims) -> None:
        self.settings, self.ledger, self.chat = settings, ledger, chat
        self.dims = dims
        """Shapes of the base that computes now; another group may have another."""
        self.suspects = Suspects(ledger)
        self._served = Served.nothing(1 + len(settings.scheduler.tenants))

    def plan(self, ahead: bool) -> PlannedWave | None:
        """The next wave, its attempt logged, without users in uncommitted waves. None when nobody
        has anything, or `ahead` and it would not be full."""
        members = self._choose(ahead)
        if not members:
            return None
        wave_id = wave_id_of(members)
        self._admit(wave_id, members)
        return PlannedWave(wave_id=wave_id, members=tuple(map(self._planned, members)))

    def take_back(self, planned: PlannedWave) -> None:
        """Log that an attempt never began."""
        members = [item.member for item in planned.members]
        self.ledger.append_all(_attempts(planned.wave_id, members, is_withdrawn=True))

    # Who.

    def _choose(self, ahead: bool) -> list[WaveMember]:
        """The users of the next wave with their events."""
        pending, scheduler = self.ledger.pending, self.settings.scheduler
        if suspects := self.suspects.users():
            return [] if ahead or pending.busy() else self._suspicious(suspects)
        candidates = pending.candidates(self._load_bytes_per_rank)
        choice = form_wave(candidates, scheduler, self._served, pending.now())
        is_full = choice.was_cut or len(choice.chosen) == scheduler.max_adapters_per_wave
        if ahead and not is_full:
            return []
        self._served = choice.served
        users = map(pending.pseudonym, choice.chosen.tolist())
        return self._members(users, scheduler.events_per_update)

    def _suspicious(self, suspects: Sequence[str]) -> list[WaveMember]:
        """A small wave of suspects, or one event of one user of whom two attempts died; nothing is
        beside it."""
        if twice := self.suspects.died_twice(suspects):
            return self._members(twice[:1], 1)
        scheduler = self.settings.scheduler
        most = max(1, scheduler.max_adapters_per_wave // SUSPECTS_SHARE)
        return self._members(suspects[:most], scheduler.events_per_update)

    @property
    def _load_bytes_per_rank(self) -> float:
        """Weights and two moments in fp32."""
        adapter = self.settings.adapter
        ranks = adapter_spec(self.settings, UserId("")).ranks
        return 12.0 * layout_of(self.dims, *ranks).size / adapter.rank

    def _members(self, pseudonyms: Iterable[str], num_events: int) -> list[WaveMember]:
        found = [self._member(pseudonym, num_events) for pseudonym in pseudonyms]
        return [member for member in found if member is not None]

    def _member(self, pseudonym: str, num_events: int) -> WaveMember | None:
        """A user's share of a wave: its next events, and what settles with them; None for a user
        who was erased meanwhile."""
        pending = self.ledger.pending
        row = pending.row_of(pseudonym)
        assert row is not None
        partition = int(pending.users["partition"][row])
        states = {item.position: item.state for item in pending.waiting(pseudonym, num_events)}
        events = self.ledger.events(partition, list(states))
        if not events:
            return None
        own = [(logged, states[logged.ref.position]) for logged in events]
        return WaveMember(
            user=events[0].user,
            pseudonym=pseudonym,
            partition=partition,
            events=tuple(logged for logged, state in own if state is EventState.PENDING),
            rejected=tuple(
                Settlement(logged=logged, reason=Reason(text=REASONS[state]))
                for logged, state in own
                if state is not EventState.PENDING
            ),
        )

    # The attempt's record, then what is to be done.

    def _admit(self, wave_id: str, members: Sequence[WaveMember]) -> None:
        """Create the adapters that don't exist yet, and log which events are about to be tried."""
        catalog, pending = self.ledger.catalog, self.ledger.pending
        new = [member for member in members if member.pseudonym not in catalog]
        records: list[tuple[int, Record]] = [
            (member.partition, self._created(member)) for member in new
        ]
        self.ledger.append_all(records + _attempts(wave_id, members))
        for member in new:
            pending.mark_rank(member.pseudonym, catalog.require(member.pseudonym).spec["rank"])

    def _created(self, member: WaveMember) -> AdapterCreated:
        meta, pseudonym = self.ledger.meta, member.pseudonym
        return AdapterCreated(
            pseudonym=pseudonym,
            spec=adapter_spec(self.settings, member.user).as_dict(),
            seed=self.ledger.seals.mask_seed(pseudonym, meta.adapter_seed(member.user)),
        )

    def _planned(self, member: WaveMember) -> PlannedMember:
        catalog = self.ledger.catalog
        adapter = catalog.require(member.pseudonym)
        # A long history takes a while to walk, and only logged trajectories ask for it.
        is_asked = any(isinstance(logged.event, Trajectory) for logged in member.events)
        given = Preparation(
            adapter=adapter,
            lineage=catalog.lineage_of(adapter.pseudonym, adapter.tip) if is_asked else (),
            chat=self.chat,
            dims=self.dims,
            settings=self.settings,
        )
        return PlannedMember(
            member=member,
            adapter=adapter,
            ref=self.ledger.ref(adapter, adapter.tip),
            events=tuple(prepare_event(logged, given) for logged in member.events),
        )


def adapter_spec(settings: Settings, user: UserId) -> AdapterSpec:
    """What a user's adapter is created as."""
    adapter = settings.adapter
    return AdapterSpec(
        rank=settings.user_ranks.get(user, adapter.rank),
        expert_rank=adapter.expert_rank,
        targets=adapter.targets,
        alpha=adapter.alpha,
        learning_rate=adapter.learning_rate,
        b_learning_rate_ratio=adapter.b_learning_rate_ratio,
    )


def _attempts(
    wave_id: str, members: Sequence[WaveMember], is_withdrawn: bool = False
) -> list[tuple[int, Record]]:
    """One record per partition of what is about to be tried; of nothing, when it is taken back."""
    by_partition: dict[int, list[WaveMember]] = {}
    for member in members:
        by_partition.setdefault(member.partition, []).append(member)
    records: list[tuple[int, Record]] = []
    for partition, own in by_partition.items():
        tried = {
            member.pseudonym: [] if is_withdrawn else [event.ref for event in member.events]
            for member in own
        }
        attempt = Attempt(wave=wave_id, num_adapters=len(members), adapters=tried)
        records.append((partition, attempt))
    return records
