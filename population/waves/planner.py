"""Forms waves: what may have killed a controller goes first, in small waves or alone; then whose
turn it is.

    suspects, or form_wave over the pending index -> the users' next events -> attempt logged ->
    tokens and requests

An attempt is in the log before anything of it is tried, so that an event that kills the controller
is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from populace.configs.schema import Settings
from populace.population.experience.pending import PENDING, REASONS
from populace.population.ledger.ledger import Ledger
from populace.population.waves.chat import Chat
from populace.population.waves.outcomes import MAX_TRIES
from populace.population.waves.prepare import prepare_member
from populace.population.waves.rollouts import Trials
from populace.population.waves.scheduler import Budget, Served, form_wave, policy_of
from populace.population.waves.suspects import SUSPECTS_SHARE
from populace.population.waves.wave import PlannedWave, Prepared, Wave, WaveMember, wave_of
from populace.storage.catalog.states import AdapterState
from populace.storage.log.records import (
    AdapterCreated,
    Attempt,
    EventRef,
    Record,
    Settled,
    SettledEvent,
)
from populace.workers.batch import AdapterKey
from populace.workers.layout import layout_of
from populace.workers.shapes import AdapterSpec, BaseDims


class Planner:
    """Plans the waves of the partitions that `ledger` owns."""

    def __init__(
        self, settings: Settings, ledger: Ledger, chat: Chat, trials: Trials, dims: BaseDims
    ) -> None:
        self.settings, self.ledger, self.chat, self.trials, self.dims = (
            settings,
            ledger,
            chat,
            trials,
            dims,
        )
        self._served = Served.nothing(1 + len(settings.scheduler.tenants))
        self._suspects: dict[str, tuple[int, int]] = {}
        """Users with events that were being tried when somebody died, and where the last of them
        lies."""
        self.suspect_unfinished()

    def plan(self, busy: Set[str], ahead: bool) -> PlannedWave | None:
        """The next wave, its attempt logged; None when nobody has anything, or `ahead` and it would
        not be full. `busy`: users in uncommitted waves."""
        members = self._choose(busy, ahead)
        if not members:
            return None
        wave = wave_of(members)
        adapters = self._admit(wave)
        return PlannedWave(
            wave=wave,
            adapters=adapters,
            prepared=tuple(
                self._prepare(member, adapters[member.pseudonym]) for member in wave.members
            ),
            refs=tuple(
                self.ledger.ref(adapters[member.pseudonym], adapters[member.pseudonym].tip)
                for member in wave.members
            ),
        )

    def take_back(self, planned: PlannedWave) -> None:
        """Log that an attempt never began."""
        wave = planned.wave
        attempts = [
            (number, _attempt(wave, own, is_withdrawn=True))
            for number, own in _by_partition(wave).items()
        ]
        self.ledger.append_all(attempts)

    def suspect_unfinished(self, partitions: Sequence[int] | None = None) -> None:
        """Try events whose attempt died with its controller, or with the shards, in small waves,
        and those of which two attempts died all alone: what kills is soon found, and what was only
        beside it isn't blamed. `partitions`: those that were just taken over; None: all."""
        for partition in self.ledger.owned() if partitions is None else partitions:
            for pseudonym, refs in self.ledger.catalog.attempts.unfinished.get(
                partition, {}
            ).items():
                self._suspects[pseudonym] = max(ref.position for ref in refs)

    def forgive(self, partitions: Sequence[int]) -> None:
        """Take back the attempts that this run gave up because the store went away: it wasn't the
        events' fault."""
        for partition in partitions:
            gone: dict[str, list[EventRef]] = {
                pseudonym: []
                for pseudonym in self.ledger.catalog.attempts.unfinished.get(partition, {})
            }
            if gone:
                self.ledger.append(
                    partition, Attempt(wave="given up", num_adapters=len(gone), adapters=gone)
                )

    def suspected_users(self) -> frozenset[str]:
        """Users whose next event is one that was being tried when a controller died."""
        suspected = set()
        for pseudonym, last in list(self._suspects.items()):
            waiting = self.ledger.pending.waiting(pseudonym, 1)
            if any(item.position <= last for item in waiting if item.state == PENDING):
                suspected.add(pseudonym)
            else:
                del self._suspects[pseudonym]
        return frozenset(suspected)

    def park_killers(self, busy: Set[str]) -> list[Settled]:
        """Settle an event whose attempts died too often, the last one alone: it is what kills the
        controller."""
        parked = []
        killers = [
            (pseudonym, tries)
            for pseudonym, tries in self.ledger.catalog.attempts.tries.items()
            if tries.count >= MAX_TRIES and tries.is_alone and pseudonym not in busy
        ]
        for pseudonym, tries in killers:
            adapter, ref = self.ledger.catalog.get(pseudonym), tries.event
            if adapter is None or adapter.partition not in self.ledger.owned():
                continue
            reason = f"parked: {tries.count} attempts did not survive, the last one with this event alone"
            before = [
                item
                for item in self.ledger.pending.waiting(pseudonym)
                if item.position < ref.position
            ]
            refs = {
                logged.ref.position: logged.ref
                for logged in self.ledger.events(
                    adapter.partition, [item.position for item in before]
                )
            }
            settled = [
                SettledEvent(event=refs[item.position], reason=REASONS[item.state])
                for item in before
                if item.state != PENDING
            ]
            settled.append(SettledEvent(event=ref, reason=reason))
            record = Settled(pseudonym=pseudonym, events=settled, consumed=ref.position)
            self.ledger.append(adapter.partition, record)
            parked.append(record)
        return parked

    def _choose(self, busy: Set[str], ahead: bool) -> list[WaveMember]:
        """The users of the next wave with their events."""
        suspects = self.suspected_users()
        if suspects:
            return [] if ahead or busy else self._suspicious(suspects)
        pending, scheduler = self.ledger.pending, self.settings.scheduler
        candidates = pending.candidates(self._load_bytes_per_rank)
        choice = form_wave(
            candidates,
            self._budget(),
            policy_of(self.settings.scheduler),
            self._served,
            pending.now(),
        )
        if ahead and not choice.was_cut and len(choice.chosen) < scheduler.max_adapters_per_wave:
            return []
        self._served = choice.served
        return self._members(
            map(pending.pseudonym, choice.chosen.tolist()), scheduler.events_per_update
        )

    def _suspicious(self, suspects: frozenset[str]) -> list[WaveMember]:
        """A small wave of suspects, or one event of one user of whom two attempts died; nothing is
        beside it."""
        scheduler, tries = self.settings.scheduler, self.ledger.catalog.attempts.tries
        twice = [name for name in sorted(suspects) if name in tries and tries[name].count > 1]
        if twice:
            return self._members(twice[:1], 1)
        most = max(1, scheduler.max_adapters_per_wave // SUSPECTS_SHARE)
        return self._members(sorted(suspects)[:most], scheduler.events_per_update)

    def _budget(self) -> Budget:
        scheduler = self.settings.scheduler
        megabytes = scheduler.max_load_mb_per_wave
        largest = self._load_bytes_per_rank * max(
            [self.settings.adapter.rank, *self.settings.user_ranks.values()]
        )
        return Budget(
            max_adapters=scheduler.max_adapters_per_wave,
            max_tokens=scheduler.max_tokens_per_wave,
            max_rank=scheduler.max_rank_per_wave,
            max_load_bytes=None if megabytes is None else max(megabytes * 1e6, largest),
        )

    @property
    def _load_bytes_per_rank(self) -> float:
        """Weights and two moments in fp32."""
        adapter = self.settings.adapter
        return 12.0 * layout_of(self.dims, adapter.rank, adapter.expert_rank).size / adapter.rank

    def _members(self, pseudonyms: Iterable[str], num_events: int) -> list[WaveMember]:
        found = [self._member(pseudonym, num_events) for pseudonym in pseudonyms]
        return [member for member in found if member is not None]

    def _member(self, pseudonym: str, num_events: int) -> WaveMember | None:
        """A user's share of a wave: its next events, and what settles with them."""
        pending = self.ledger.pending
        row = pending.row_of(pseudonym)
        assert row is not None
        partition = int(pending.users["partition"][row])
        waiting = pending.waiting(pseudonym, num_events)
        states = {item.position: item.state for item in waiting}
        events = self.ledger.events(partition, list(states))
        if not events:
            return None
        return WaveMember(
            user=events[0].user,
            pseudonym=pseudonym,
            partition=partition,
            events=tuple(item for item in events if states[item.ref.position] == PENDING),
            rejected=tuple(
                SettledEvent(event=item.ref, reason=REASONS[states[item.ref.position]])
                for item in events
                if states[item.ref.position] != PENDING
            ),
        )

    def _admit(self, wave: Wave) -> dict[str, AdapterState]:
        """Create the adapters that don't exist yet, and log which events are about to be tried."""
        settings, catalog = self.settings.adapter, self.ledger.catalog
        records: list[tuple[int, Record]] = []
        new = [member for member in wave.members if member.pseudonym not in catalog]
        for member in new:
            spec = AdapterSpec(
                rank=self.settings.user_ranks.get(member.user, settings.rank),
                expert_rank=settings.expert_rank,
                alpha=settings.alpha,
                learning_rate=settings.learning_rate,
                b_learning_rate_ratio=settings.b_learning_rate_ratio,
            )
            seed = self.ledger.mask_seed(
                member.pseudonym, self.ledger.meta.adapter_seed(member.user)
            )
            created = AdapterCreated(pseudonym=member.pseudonym, spec=spec.as_dict(), seed=seed)
            records.append((member.partition, created))
        records += [
            (partition, _attempt(wave, members))
            for partition, members in _by_partition(wave).items()
        ]
        self.ledger.append_all(records)
        for member in new:
            self.ledger.pending.mark_rank(
                member.pseudonym, catalog.require(member.pseudonym).spec["rank"]
            )
        return {member.pseudonym: catalog.require(member.pseudonym) for member in wave.members}

    def _prepare(self, member: WaveMember, adapter: AdapterState) -> Prepared:
        return prepare_member(
            member,
            adapter,
            lineage=self.ledger.catalog.lineage_of(adapter.pseudonym, adapter.tip),
            settle=self.ledger.seals.settled,
            chat=self.chat,
            dims=self.dims,
            train=self.settings.train,
            request=self.trials.requester(AdapterKey(adapter.pseudonym, adapter.tip)),
            reward_names=self.settings.rewards.functions,
        )


def _by_partition(wave: Wave) -> dict[int, list[WaveMember]]:
    members: dict[int, list[WaveMember]] = {}
    for member in wave.members:
        members.setdefault(member.partition, []).append(member)
    return members


def _attempt(wave: Wave, members: Sequence[WaveMember], is_withdrawn: bool = False) -> Attempt:
    """What is about to be tried of one partition; nothing, when it is taken back."""
    tried = {
        member.pseudonym: [] if is_withdrawn else [event.ref for event in member.events]
        for member in members
    }
    return Attempt(wave=wave.wave_id, num_adapters=len(wave.members), adapters=tried)
