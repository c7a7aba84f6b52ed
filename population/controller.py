"""The loop that keeps a population learning.

    enqueue -> experience log -> pending index -> form_wave -> page in -> roll out -> score -> train
                                                                                               |
                                        evaluate <- apply to the catalog <- publish <----------+

`run_once` is this picture for one wave. Around it the next waves are already on their way and the last one is still
being published:

    wave n+2   plan, prefetch
    wave n+1                    roll out
    wave n                                 score, train
    wave n-1                                             publish

A user is in one of these at most, so that no update waits for another. Calls to the workers go through one lane, in the
order in which they are made. Every stage returns a value to `run_once`; no stage calls the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from populace.configs.load import settings_as_dict
from populace.configs.schema import Settings
from populace.population.chat import Chat
from populace.population.exams import Examiner
from populace.population.ledger import Ledger
from populace.population.outcomes import MAX_TRIES, MemberOutcome, account_for
from populace.population.pending import PENDING, REASONS
from populace.population.prepare import Prepared, prepare_member
from populace.population.publish import Publication, Publisher
from populace.population.scheduler import Budget, Served, Wave, WaveMember, form_wave, policy_of, wave_of
from populace.population.trials import Rollout, Score, Trials, Workers, tip_ref
from populace.population.wave_report import Clock, WaveReport, report_of
from populace.storage.errors import PopulaceError
from populace.storage.records import (
    AdapterCreated,
    Attempt,
    EventRef,
    Record,
    Settled,
    SettledEvent,
    Tombstone,
    Verdict,
)
from populace.storage.repack import RetentionRule
from populace.storage.states import AdapterState
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    AdapterRef,
    Paging,
    ScoredSample,
    TrainGroup,
    WaveBatch,
)
from populace.workers.layout import AdapterSpec, layout_of

SUSPECTS_SHARE = 8
"""What died in a full wave is tried again in waves of this part of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWave:
    """A wave whose attempt is logged and whose adapters are on their way into memory."""

    wave: Wave
    adapters: dict[str, AdapterState]
    prepared: tuple[Prepared, ...]
    refs: tuple[AdapterRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RollingWave:
    """A wave whose rollouts are under way, or done."""

    planned: PlannedWave
    rollouts: Future[list[Rollout]]
    paging: list[Paging]
    """One, once the adapters are hot."""


class Controller:
    """Owns partitions of a population while it lives. `ledger` must have claimed or joined."""

    def __init__(self, settings: Settings, ledger: Ledger, workers: Workers, chat: Chat, score: Score) -> None:
        self.settings, self.ledger, self.workers, self.chat = settings, ledger, workers, chat
        self.trials = Trials(settings, workers, chat, score)
        self.examiner = Examiner(self.trials, ledger)
        self.publisher = Publisher(ledger, settings_as_dict(settings), chat.template_digest())
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="populace-workers")
        self.meet_workers()
        self.num_waves = 0
        self._served = Served.nothing(1 + len(settings.scheduler.tenants))
        self._planned: PlannedWave | None = None
        self._rolling: RollingWave | None = None
        self._publication: Publication | None = None
        self._renaming: Future[None] | None = None
        self._between: list[Verdict | Tombstone | Settled] = []
        """Written since the last report, beside waves."""
        self._busy: set[str] = set()
        """Users in an uncommitted wave."""
        self._suspects: dict[str, tuple[int, int]] = {}
        self.suspect_unfinished()

    def run_once(self) -> WaveReport | None:
        """One wave from pending experience to revisions; None when nobody has any. When the run is pipelined the
        wave may still be on its way into the store when this returns; `quiesce` waits for it."""
        clock = Clock()
        try:
            current, self._rolling = self._rolling or self._roll_out(self._plan()), None
            clock.lap("plan")
            if current is None:
                return None
            rollouts = current.rollouts.result()
            self.ledger.pending.mark_hot(current.paging[0].hot)
            clock.lap("rollout")
            self._look_ahead()
            clock.lap("plan")
            batch, outcomes = self._batch(current.planned, self._score(current.planned, rollouts))
            clock.lap("score")
            training = self._lane.submit(self.workers.train_wave, batch)
            training.add_done_callback(lambda _: clock.mark())
            self.settle()
            clock.lap_up_to_mark("train", "publish")
            result = training.result()
            clock.lap("train")
            self._publication = self.publisher.start(
                current.planned.wave, current.planned.adapters, outcomes, result, self.numerics
            )
            self.num_waves += 1
            if self._rolling is None:
                self.quiesce()
            clock.lap("publish")
            verdicts = self._keep_up(clock)
        except BaseException:
            self.abandon()
            raise
        between, self._between = self._between, []
        return report_of(current.planned.wave, current.paging[0], outcomes, result, verdicts, between, clock.seconds)

    def take_answered(self) -> list[Verdict | Tombstone]:
        """Commands obeyed since somebody asked last; what a wave's report has is not among them."""
        answered = [record for record in self._between if not isinstance(record, Settled)]
        self._between = [record for record in self._between if isinstance(record, Settled)]
        return answered

    def settle(self) -> None:
        """Wait until the last wave is in the store, and let the catalog and the slots follow."""
        publication, self._publication = self._publication, None
        if publication is None:
            return
        try:
            publication.written.result()
        except BaseException:
            self._lane.submit(self.workers.evict, [old for old, _ in publication.renamed])
            raise
        finally:
            for header, record in publication.records:
                self.ledger.apply(header, record)
            self._set_free(publication.pseudonyms)
        # Before whatever the workers are asked next.
        self._renaming = self._lane.submit(self.workers.committed, publication.renamed)

    def quiesce(self) -> None:
        """`settle`, and wait until the workers know."""
        self.settle()
        if self._renaming is not None:
            renaming, self._renaming = self._renaming, None
            renaming.result()

    def abandon(self) -> None:
        """Forget what is under way; whatever isn't committed is still pending. A slot whose commit isn't known is
        dirty: what is in it must not be trained on or served."""
        if self._rolling is not None:
            self._rolling.rollouts.cancel()
        with contextlib.suppress(PopulaceError):
            self.settle()
        self._planned = self._rolling = None
        keys = self._keys_of(self._busy)
        self._set_free(self._busy)
        with contextlib.suppress(PopulaceError):
            self._lane.submit(self.workers.evict, keys).result()
        self._renaming = None  # of a group that may be gone

    def withdraw(self) -> None:
        """Take back the attempts that haven't begun to train: an orderly end must not make them suspect."""
        self.settle()
        if self._renaming is not None:
            self._renaming.exception()  # a group that is lost says so at the next call
            self._renaming = None
        waves = [self._planned] if self._planned is not None else []
        if self._rolling is not None:
            self._rolling.rollouts.exception()
            waves.append(self._rolling.planned)
        self._planned = self._rolling = None
        for planned in waves:
            by_partition = _by_partition(planned.wave)
            self.ledger.append_all([(partition, _attempt(planned.wave, members, is_withdrawn=True))
                                    for partition, members in by_partition.items()])  # fmt: skip
            self._set_free(list(planned.adapters))

    def close(self) -> None:
        """End this controller's threads."""
        self._lane.shutdown()
        self.publisher.close()

    def meet_workers(self) -> None:
        """Learn what computes: also after a group was started again, maybe on other machines."""
        self.dims, self.numerics = self.workers.describe()

    def suspect_unfinished(self, partitions: Sequence[int] | None = None) -> None:
        """Try events whose attempt died with its controller, or with the shards, in small waves, and those of which two
        attempts died all alone: what kills is soon found, and what was only beside it isn't blamed. `partitions`: those
        that were just taken over; None: all."""
        for partition in self.ledger.owned() if partitions is None else partitions:
            for pseudonym, refs in self.ledger.catalog.unfinished.get(partition, {}).items():
                self._suspects[pseudonym] = max(ref.position for ref in refs)

    def forgive(self, partitions: Sequence[int]) -> None:
        """Take back the attempts that this run gave up because the store went away: it wasn't the events' fault."""
        for partition in partitions:
            gone: dict[str, list[EventRef]] = {
                pseudonym: [] for pseudonym in self.ledger.catalog.unfinished.get(partition, {})
            }
            if gone:
                self.ledger.append(partition, Attempt(wave="given up", num_adapters=len(gone), adapters=gone))

    # Planning.

    def _look_ahead(self) -> None:
        """Let the next wave's rollouts run and the one behind it be prefetched, as long as they are full: a wave that
        waits a little gathers more users."""
        # Before an evaluation or a repack nothing may be under way.
        if not self.settings.run.pipelined or self._is_upkeep_due(self.num_waves + 1):
            return
        if self.settings.scheduler.slots < 3 * self.settings.scheduler.max_adapters_per_wave:
            self.settle()  # no room for the slots of a wave that is still being published
        following, self._planned = self._planned or self._plan(ahead=True), None
        self._rolling = self._roll_out(following)
        if following is not None and not self._is_upkeep_due(self.num_waves + 2):
            self._planned = self._plan(ahead=True)

    def _plan(self, ahead: bool = False) -> PlannedWave | None:
        """The next wave, its attempt logged, its adapters on their way; None when nobody has anything, or `ahead` and
        it would not be full."""
        self.ledger.read_experience()
        self._obey_commands()
        self._park_killers()
        members = self._choose(ahead)
        if not members:
            return None
        wave = wave_of(members)
        adapters = self._admit(wave)
        refs = tuple(tip_ref(adapters[member.pseudonym]) for member in wave.members)
        self._busy |= adapters.keys()
        self.ledger.pending.mark_busy(list(adapters), True)
        self._lane.submit(self.workers.prefetch, refs)
        prepared = tuple(self._prepare(member, adapters[member.pseudonym]) for member in wave.members)
        return PlannedWave(wave=wave, adapters=adapters, prepared=prepared, refs=refs)

    def _choose(self, ahead: bool) -> list[WaveMember]:
        """The users of the next wave with their events."""
        suspects = self._suspected_users()
        if suspects:
            return [] if ahead or self._busy else self._suspicious(suspects)
        pending, scheduler = self.ledger.pending, self.settings.scheduler
        candidates = pending.candidates(self._load_bytes_per_rank)
        choice = form_wave(candidates, self._budget(), policy_of(self.settings.scheduler), self._served, pending.now())
        if ahead and not choice.was_cut and len(choice.chosen) < scheduler.max_adapters_per_wave:
            return []
        self._served = choice.served
        names = [pending.pseudonym(row) for row in choice.chosen.tolist()]
        members = [self._member(name, scheduler.events_per_update) for name in names]
        return [member for member in members if member is not None]

    def _suspicious(self, suspects: frozenset[str]) -> list[WaveMember]:
        """A small wave of suspects, or one event of one user of whom two attempts died; nothing is beside it."""
        scheduler, tries = self.settings.scheduler, self.ledger.catalog.tries
        twice = [name for name in sorted(suspects) if name in tries and tries[name].count > 1]
        if twice:
            members = [self._member(twice[0], 1)]
        else:
            names = sorted(suspects)[: max(1, scheduler.max_adapters_per_wave // SUSPECTS_SHARE)]
            members = [self._member(name, scheduler.events_per_update) for name in names]
        return [member for member in members if member is not None]

    def _budget(self) -> Budget:
        scheduler = self.settings.scheduler
        megabytes = scheduler.max_load_mb_per_wave
        largest = self._load_bytes_per_rank * max([self.settings.adapter.rank, *self.settings.user_ranks.values()])
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

    def _obey_commands(self) -> None:
        """Commands come between two waves of a user; neither the workers nor the exams may keep what is forgotten."""
        done = self.ledger.obey_commands(self._busy)
        self._between += done
        forgotten = [record.pseudonym for record in done if isinstance(record, Tombstone)]
        if forgotten:
            self.examiner.forget(forgotten)
            self._lane.submit(self.workers.forget, forgotten).result()

    def _suspected_users(self) -> frozenset[str]:
        """Users whose next event is one that was being tried when a controller died."""
        suspected = set()
        for pseudonym, last in list(self._suspects.items()):
            waiting = self.ledger.pending.waiting(pseudonym, 1)
            if any(item.position <= last for item in waiting if item.state == PENDING):
                suspected.add(pseudonym)
            else:
                del self._suspects[pseudonym]
        return frozenset(suspected)

    def _park_killers(self) -> None:
        """Settle an event whose attempts died too often, the last one alone: it is what kills the controller."""
        killers = [
            (pseudonym, tries)
            for pseudonym, tries in self.ledger.catalog.tries.items()
            if tries.count >= MAX_TRIES and tries.is_alone and pseudonym not in self._busy
        ]
        for pseudonym, tries in killers:
            adapter, ref = self.ledger.catalog.get(pseudonym), tries.event
            if adapter is None or adapter.partition not in self.ledger.owned():
                continue
            reason = f"parked: {tries.count} attempts did not survive, the last one with this event alone"
            before = [item for item in self.ledger.pending.waiting(pseudonym) if item.position < ref.position]
            refs = {
                logged.ref.position: logged.ref
                for logged in self.ledger.events(adapter.partition, [item.position for item in before])
            }
            settled = [
                SettledEvent(event=refs[item.position], reason=REASONS[item.state])
                for item in before
                if item.state != PENDING
            ]
            settled.append(SettledEvent(event=ref, reason=reason))
            record = Settled(pseudonym=pseudonym, events=settled, consumed=ref.position)
            self.ledger.append(adapter.partition, record)
            self._between.append(record)

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
            seed = self.ledger.mask_seed(member.pseudonym, self.ledger.meta.adapter_seed(member.user))
            created = AdapterCreated(pseudonym=member.pseudonym, spec=spec.as_dict(), seed=seed)
            records.append((member.partition, created))
        records += [(partition, _attempt(wave, members)) for partition, members in _by_partition(wave).items()]
        self.ledger.append_all(records)
        for member in new:
            self.ledger.pending.mark_rank(member.pseudonym, catalog.require(member.pseudonym).spec["rank"])
        return {member.pseudonym: catalog.require(member.pseudonym) for member in wave.members}

    def _prepare(self, member: WaveMember, adapter: AdapterState) -> Prepared:
        return prepare_member(
            member,
            adapter,
            settle=self.ledger.seals.settled,
            chat=self.chat,
            dims=self.dims,
            train=self.settings.train,
            request=self.trials.requester(AdapterKey(adapter.pseudonym, adapter.tip)),
            reward_names=self.settings.rewards.functions,
        )

    # Rolling out and scoring.

    def _roll_out(self, planned: PlannedWave | None) -> RollingWave | None:
        """Page in and roll out, as soon as the workers get to it."""
        if planned is None:
            return None
        keep = self._keys_of(self._busy)
        requests = [request for item in planned.prepared for request in item.requests]
        paging: list[Paging] = []

        def call() -> list[Rollout]:
            paging.append(self.workers.page_in(planned.refs, True, keep))
            return self.trials.roll_out(requests)

        return RollingWave(planned=planned, rollouts=self._lane.submit(call), paging=paging)

    def _score(self, planned: PlannedWave, rollouts: Sequence[Rollout]) -> Mapping[tuple[str, str], TrainGroup | str]:
        """Rewarded rollouts by (user, event), or why an event's reward failed."""
        members = {member.pseudonym: member for member in planned.wave.members}
        requests = []
        for group, base in rollouts:
            member = members[group.adapter.pseudonym]
            logged = next(item for item in member.events if item.event_id == group.event_id)
            requests.append(self.trials.reward_request(logged, self.trials.replies(logged, group, base)))
        scored: dict[tuple[str, str], TrainGroup | str] = {}
        for (group, base), outcome in zip(rollouts, self.trials.judge(requests), strict=True):
            name = (group.adapter.pseudonym, group.event_id)
            if isinstance(outcome, str):
                scored[name] = outcome
                continue
            scored[name] = TrainGroup(
                event_id=group.event_id,
                kind="task",
                prompt_ids=group.prompt_ids,
                prompt_expert_ids=group.prompt_expert_ids,
                samples=tuple(
                    ScoredSample(sample=sample, reward=reward, base_logprobs=logprobs)
                    for sample, reward, logprobs in zip(group.samples, outcome, base, strict=True)
                ),
                temperature=group.temperature,
            )
        return scored

    def _batch(
        self, planned: PlannedWave, scored: Mapping[tuple[str, str], TrainGroup | str]
    ) -> tuple[WaveBatch, tuple[MemberOutcome, ...]]:
        """What every adapter learns from, and what becomes of every event."""
        outcomes = tuple(
            account_for(
                member, item, scored, self.ledger.catalog.failures.get(member.pseudonym), self.ledger.seals.settled
            )
            for member, item in zip(planned.wave.members, planned.prepared, strict=True)
        )
        batches = [
            AdapterBatch(adapter=item.adapter, groups=outcome.groups)
            for item, outcome in zip(planned.prepared, outcomes, strict=True)
        ]
        return WaveBatch(adapters=tuple(batches)), outcomes

    # Between waves.

    def _is_upkeep_due(self, num_waves: int) -> bool:
        every = (self.settings.evaluation.every_waves, self.settings.retention.every_waves)
        return any(num_waves % number == 0 for number in every)

    def _keep_up(self, clock: Clock) -> list[Verdict]:
        """Evaluations, repacks, checkpoints and compactions, as they are due."""
        verdicts: list[Verdict] = []
        if self.num_waves % self.settings.evaluation.every_waves == 0:
            verdicts = self.evaluate()
            clock.lap("evaluate")
        if self.num_waves % self.settings.retention.every_waves == 0:
            self.settle()
            self.ledger.repack(RetentionRule(last=self.settings.retention.last))
            clock.lap("repack")
        if self._publication is None:  # a checkpoint holds all of the log
            self.ledger.checkpoint(self.settings.run.checkpoint_every_records)
        self.ledger.compact(self.settings.stream.compact_every_segments)
        clock.lap("checkpoint")
        return verdicts

    def evaluate(self) -> list[Verdict]:
        """Judge the tips that aren't serving; nothing may be under way beside it."""
        self.quiesce()
        assert not self._busy
        return self.examiner.evaluate()

    def _set_free(self, pseudonyms: Sequence[str] | set[str]) -> None:
        names = list(pseudonyms)
        self.ledger.pending.mark_busy(names, False)
        self._busy -= set(names)

    def _keys_of(self, pseudonyms: set[str]) -> list[AdapterKey]:
        """The slots of users under way: they are named after the tips that they start from."""
        states = [self.ledger.catalog.get(pseudonym) for pseudonym in sorted(pseudonyms)]
        return [AdapterKey(state.pseudonym, state.tip) for state in states if state is not None]


def _by_partition(wave: Wave) -> dict[int, list[WaveMember]]:
    members: dict[int, list[WaveMember]] = {}
    for member in wave.members:
        members.setdefault(member.partition, []).append(member)
    return members


def _attempt(wave: Wave, members: Sequence[WaveMember], is_withdrawn: bool = False) -> Attempt:
    """What is about to be tried of one partition; nothing, when it is taken back."""
    tried = {member.pseudonym: [] if is_withdrawn else [event.ref for event in member.events] for member in members}
    return Attempt(wave=wave.wave_id, num_adapters=len(wave.members), adapters=tried)
