"""The loop that keeps a population learning.

    enqueue -> experience log -> pending index -> form_wave -> page in -> roll out -> score -> train
                                                                                               |
                                        evaluate <- apply to the catalog <- publish <----------+

`run_once` is this picture for one wave. Around it the next waves are already on their way and the
last one is still being published:

    wave n+2   plan, prefetch
    wave n+1                    roll out
    wave n                                 score, train
    wave n-1                                             publish

A user is in one of these at most, so that no update waits for another. Calls to the workers go
through one lane, in the order in which they are made. Every stage returns a value to `run_once`; no
stage calls the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from populace.configs.load import settings_as_dict
from populace.configs.schema import Settings
from populace.population.evaluation.examiner import Examiner
from populace.population.ledger.ledger import Ledger
from populace.population.waves.chat import Chat
from populace.population.waves.outcomes import account_for
from populace.population.waves.planner import Planner
from populace.population.waves.publisher import Publisher
from populace.population.waves.report import Clock, WaveReport, report_of
from populace.population.waves.rollouts import Rollout, Score, Trials
from populace.population.waves.wave import MemberOutcome, PlannedWave, Publication, RollingWave
from populace.storage.catalog.repack import RetentionRule
from populace.storage.errors import PopulaceError
from populace.storage.log.records import Settled, Tombstone, Verdict
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    Paging,
    ScoredSample,
    TrainGroup,
    WaveBatch,
)
from populace.workers.interface import Workers


class Controller:
    """Owns partitions of a population while it lives. `ledger` must have claimed or joined."""

    def __init__(
        self, settings: Settings, ledger: Ledger, workers: Workers, chat: Chat, score: Score
    ) -> None:
        self.settings, self.ledger, self.workers, self.chat = settings, ledger, workers, chat
        self.trials = Trials(settings, workers, chat, score)
        self.examiner = Examiner(self.trials, ledger)
        self.publisher = Publisher(ledger, settings_as_dict(settings), chat.template_digest())
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="populace-workers")
        dims, self.numerics = workers.describe()
        self.planner = Planner(settings, ledger, chat, self.trials, dims)
        self.num_waves = 0
        self._planned: PlannedWave | None = None
        self._rolling: RollingWave | None = None
        self._publication: Publication | None = None
        self._renaming: Future[None] | None = None
        self._between: list[Verdict | Tombstone | Settled] = []
        """Written since the last report, beside waves."""
        self._busy: set[str] = set()
        """Users in an uncommitted wave."""

    def run_once(self) -> WaveReport | None:
        """One wave from pending experience to revisions; None when nobody has any. When the run is
        pipelined the wave may still be on its way into the store when this returns; `quiesce` waits
        for it."""
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
        return report_of(
            current.planned.wave,
            current.paging[0],
            outcomes,
            result,
            verdicts,
            between,
            clock.seconds,
        )

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
        """Forget what is under way; whatever isn't committed is still pending. A slot whose commit
        isn't known is dirty: what is in it must not be trained on or served."""
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
        """Take back the attempts that haven't begun to train: an orderly end must not make them
        suspect."""
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
            self.planner.take_back(planned)
            self._set_free(list(planned.adapters))

    def close(self) -> None:
        """End this controller's threads."""
        self._lane.shutdown()
        self.publisher.close()

    def meet_workers(self) -> None:
        """Learn what computes: also after a group was started again, maybe on other machines."""
        self.planner.dims, self.numerics = self.workers.describe()

    # Planning.

    def _look_ahead(self) -> None:
        """Let the next wave's rollouts run and the one behind it be prefetched, as long as they are
        full: a wave that waits a little gathers more users."""
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
        """The next wave, its attempt logged, its adapters on their way; None when nobody has
        anything, or `ahead` and it would not be full."""
        self.ledger.read_experience()
        self._obey_commands()
        self._between += self.planner.park_killers(self._busy)
        planned = self.planner.plan(self._busy, ahead)
        if planned is not None:
            self._busy |= planned.adapters.keys()
            self.ledger.pending.mark_busy(list(planned.adapters), True)
            self._lane.submit(self.workers.prefetch, planned.refs)
        return planned

    def _obey_commands(self) -> None:
        """Commands come between two waves of a user; neither the workers nor the exams may keep
        what is forgotten."""
        done = self.ledger.obey_commands(self._busy)
        self._between += done
        forgotten = [record.pseudonym for record in done if isinstance(record, Tombstone)]
        if forgotten:
            self.examiner.forget(forgotten)
            self._lane.submit(self.workers.forget, forgotten).result()

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

    def _score(
        self, planned: PlannedWave, rollouts: Sequence[Rollout]
    ) -> Mapping[tuple[str, str], TrainGroup | str]:
        """Rewarded rollouts by (user, event), or why an event's reward failed."""
        members = {member.pseudonym: member for member in planned.wave.members}
        requests = []
        for group, base in rollouts:
            member = members[group.adapter.pseudonym]
            logged = next(item for item in member.events if item.event_id == group.event_id)
            requests.append(
                self.trials.reward_request(logged, self.trials.replies(logged, group, base))
            )
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
                member,
                item,
                scored,
                self.ledger.catalog.attempts.failures.get(member.pseudonym),
                self.ledger.seals.settled,
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
