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

What is on its way is a value, the `Pipeline`, that `run_once` takes and returns. A user is in one
of these waves at most, so that no update waits for another. Calls to the workers go through one
lane, in the order in which they are made. Every stage returns a value to `run_once`; no stage calls
the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from populace.configs.load import settings_as_dict
from populace.configs.schema import Settings
from populace.population.evaluation.examiner import Examiner
from populace.population.ledger.commands import obey_commands
from populace.population.ledger.ledger import Ledger
from populace.population.ledger.upkeep import Upkeep
from populace.population.waves.outcomes import Scored, account_for, scored_group
from populace.population.waves.planner import Planner
from populace.population.waves.publisher import Publication, Publisher
from populace.population.waves.report import Clock, RunState, WaveReport, report_of
from populace.population.waves.rollouts import Score, Trials
from populace.population.waves.wave import (
    MemberOutcome,
    PlannedWave,
    RolledOut,
    RollingWave,
    TrainedWave,
    batch_of,
)
from populace.storage.catalog.repack import RetentionRule
from populace.storage.errors import PopulaceError
from populace.storage.log.records import Settled, Tombstone, Verdict
from populace.workers.batch import AdapterKey, RolloutRequest
from populace.workers.interface import Workers

if TYPE_CHECKING:
    from populace.population.waves.chat import Chat


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The waves that are on their way between two turns of the loop.

    Example: `Pipeline(rolling=n1, publication=n0)`: one wave rolls out while the one before is
    being written."""

    planned: PlannedWave | None = None
    """A wave whose adapters are being prefetched."""
    rolling: RollingWave | None = None
    publication: Publication | None = None
    renaming: Future[None] | None = None
    """The workers are learning which revisions their slots hold now."""


EMPTY = Pipeline()
"""Nothing is on its way."""


class Controller:
    """Trains waves of the partitions that `ledger` owns. They must have been claimed or joined."""

    def __init__(
        self, settings: Settings, ledger: Ledger, workers: Workers, chat: Chat, score: Score
    ) -> None:
        self.settings, self.ledger, self.workers = settings, ledger, workers
        self.trials = Trials(settings, workers, chat, score)
        self.examiner = Examiner(self.trials, ledger)
        self.publisher = Publisher(ledger, settings_as_dict(settings), chat.template_digest())
        self.upkeep = Upkeep(ledger)
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="populace-workers")
        dims, self.numerics = workers.describe()
        self.planner = Planner(settings, ledger, chat, dims)
        self.num_waves = 0
        self._between: list[Verdict | Tombstone | Settled] = []
        """Written since the last report, beside waves."""

    def run_once(self, pipeline: Pipeline = EMPTY) -> tuple[WaveReport | None, Pipeline]:
        """One wave from pending experience to revisions; no report when nobody has any. The wave
        may still be on its way into the store when this returns: `drain` waits for it. When this
        raises, nothing is on its way any more, and whatever isn't committed is still pending."""
        clock = Clock()
        try:
            rolling = pipeline.rolling or self._roll_out(self._plan())
            pipeline = replace(pipeline, rolling=None)
            clock.lap("plan")
            if rolling is None:
                return None, pipeline
            rolled = rolling.rolled.result()
            self.ledger.pending.mark_hot(rolled.paging.hot)
            clock.lap("rollout")
            pipeline = self._look_ahead(pipeline)
            clock.lap("plan")
            outcomes = self._outcomes(rolling.planned, rolled)
            clock.lap("score")
            training = self._lane.submit(self.workers.train_wave, batch_of(outcomes))
            training.add_done_callback(lambda _: clock.mark())
            pipeline = self.finish_publication(pipeline)
            clock.lap_up_to_mark("train", "publish")
            trained = TrainedWave.of(rolling.planned.wave_id, outcomes, training.result())
            clock.lap("train")
            publication = self.publisher.start(trained, self.numerics)
            pipeline = replace(pipeline, publication=publication)
            self.num_waves += 1
            if pipeline.rolling is None:
                pipeline = self.drain(pipeline)
            clock.lap("publish")
            verdicts, pipeline = self._keep_up(pipeline, clock)
        except BaseException:
            self.drop_in_flight(pipeline)
            raise
        between, self._between = self._between, []
        return report_of(trained, rolled.paging, verdicts, between, clock.seconds), pipeline

    def state(self) -> RunState:
        """What is true now, wave or not."""
        pending, catalog = self.ledger.pending, self.ledger.catalog
        return RunState(
            population=self.ledger.meta.name,
            controller=self.settings.run.controller,
            num_waves=self.num_waves,
            num_pending=pending.num_pending(),
            oldest_wait_s=pending.oldest_wait_s(),
            num_partitions=len(self.ledger.owners),
            num_adapters=len(catalog),
            num_updated=catalog.num_updated(),
        )

    def take_answered(self) -> list[Verdict | Tombstone]:
        """Commands obeyed since somebody asked last; what a wave's report has is not among them."""
        answered = [record for record in self._between if not isinstance(record, Settled)]
        self._between = [record for record in self._between if isinstance(record, Settled)]
        return answered

    # What is on its way.

    def finish_publication(self, pipeline: Pipeline) -> Pipeline:
        """Wait until the last wave is in the store, and let the catalog and the slots follow."""
        publication = pipeline.publication
        landed = None if publication is None else publication.collect()
        if publication is None or landed is None:
            return replace(pipeline, publication=None)
        for header, record in landed.records:
            self.ledger.apply(header, record)
        self.ledger.pending.mark_busy(publication.pseudonyms, False)
        if landed.error is not None:
            self._lane.submit(self.workers.evict, [old for old, _ in publication.renamed])
            raise landed.error
        # Before whatever the workers are asked next.
        renaming = self._lane.submit(self.workers.committed, publication.renamed)
        return replace(pipeline, publication=None, renaming=renaming)

    def drain(self, pipeline: Pipeline) -> Pipeline:
        """`finish_publication`, and wait until the workers know."""
        pipeline = self.finish_publication(pipeline)
        if pipeline.renaming is not None:
            pipeline.renaming.result()
        return replace(pipeline, renaming=None)

    def drop_in_flight(self, pipeline: Pipeline) -> None:
        """Forget what is under way; whatever isn't committed is still pending. A slot whose commit
        isn't known is dirty: what is in it must not be trained on or served."""
        if pipeline.rolling is not None:
            pipeline.rolling.rolled.cancel()
        with contextlib.suppress(PopulaceError):
            self.finish_publication(pipeline)
        busy = self.ledger.pending.busy()
        dirty = self._tips_of(busy)
        self.ledger.pending.mark_busy(busy, False)
        with contextlib.suppress(PopulaceError):
            self._lane.submit(self.workers.evict, dirty).result()

    def take_back_attempts(self, pipeline: Pipeline) -> Pipeline:
        """Finish what was trained, and take back the attempts that haven't begun to train: an
        orderly end must not make them suspect. Nothing is on its way afterwards."""
        pipeline = self.finish_publication(pipeline)
        if pipeline.renaming is not None:
            pipeline.renaming.exception()  # a group that is lost says so at the next call
        waves = [] if pipeline.planned is None else [pipeline.planned]
        if pipeline.rolling is not None:
            pipeline.rolling.rolled.exception()
            waves.append(pipeline.rolling.planned)
        for planned in waves:
            self.planner.take_back(planned)
            self.ledger.pending.mark_busy(planned.pseudonyms, False)
        return EMPTY

    def close(self) -> None:
        """End this controller's threads."""
        self._lane.shutdown()
        self.publisher.close()
        self.upkeep.close()

    def meet_workers(self) -> None:
        """Learn what computes: also after a group was started again, maybe on other machines."""
        self.planner.dims, self.numerics = self.workers.describe()

    # Planning.

    def _look_ahead(self, pipeline: Pipeline) -> Pipeline:
        """Let the next wave's rollouts run and the one behind it be prefetched, as long as they are
        full: a wave that waits a little gathers more users."""
        # Before an evaluation or a repack nothing may be under way.
        if not self.settings.run.pipelined or self._is_upkeep_due(self.num_waves + 1):
            return pipeline
        scheduler = self.settings.scheduler
        if scheduler.slots < 3 * scheduler.max_adapters_per_wave:
            # No room for the slots of a wave that is still being published.
            pipeline = self.finish_publication(pipeline)
        following = pipeline.planned or self._plan(ahead=True)
        rolling = self._roll_out(following)
        planned = None
        if following is not None and not self._is_upkeep_due(self.num_waves + 2):
            planned = self._plan(ahead=True)
        return replace(pipeline, rolling=rolling, planned=planned)

    def _plan(self, ahead: bool = False) -> PlannedWave | None:
        """The next wave, its attempt logged, its adapters on their way; None when nobody has
        anything, or `ahead` and it would not be full."""
        self.ledger.read_experience()
        busy = self.ledger.pending.busy()
        self._obey_commands(busy)
        self._between += self.planner.suspects.park_killers(busy)
        planned = self.planner.plan(ahead)
        if planned is not None:
            self.ledger.pending.mark_busy(planned.pseudonyms, True)
            self._lane.submit(self.workers.prefetch, planned.refs)
        return planned

    def _obey_commands(self, busy: Sequence[str]) -> None:
        """Commands come between two waves of a user; neither the workers nor the exams may keep
        what is erased."""
        done = obey_commands(self.ledger, busy)
        self._between += done
        erased = [record.pseudonym for record in done if isinstance(record, Tombstone)]
        if erased:
            self.examiner.forget(erased)
            self._lane.submit(self.workers.forget, erased).result()

    # Rolling out and scoring.

    def _roll_out(self, planned: PlannedWave | None) -> RollingWave | None:
        """Page in and roll out, as soon as the workers get to it."""
        if planned is None:
            return None
        keep = self._tips_of(self.ledger.pending.busy())
        requests = [request for member in planned.members for request in member.requests]
        return RollingWave(
            planned=planned,
            rolled=self._lane.submit(self._page_in_and_roll_out, planned, requests, keep),
        )

    def _page_in_and_roll_out(
        self,
        planned: PlannedWave,
        requests: Sequence[RolloutRequest],
        keep: Sequence[AdapterKey],
    ) -> RolledOut:
        """In the lane; `keep`: slots of the waves beside this one."""
        paging = self.workers.page_in(planned.refs, True, keep)
        return RolledOut(paging=paging, rollouts=self.trials.roll_out(requests))

    def _outcomes(self, planned: PlannedWave, rolled: RolledOut) -> tuple[MemberOutcome, ...]:
        """Judge the rollouts; then what every adapter learns from, and what becomes of every
        event."""
        logged = {
            (member.key, event.logged.event_id): event.logged
            for member in planned.members
            for event in member.events
        }
        groups = [rollout.group for rollout in rolled.rollouts]
        tasks = [logged[group.adapter, group.event_id] for group in groups]
        requests = [
            self.trials.reward_request(task, self.trials.replies(task, rollout))
            for task, rollout in zip(tasks, rolled.rollouts, strict=True)
        ]
        scored: dict[AdapterKey, dict[str, Scored]] = {}
        judged = self.trials.judge(requests)
        for rollout, outcome in zip(rolled.rollouts, judged, strict=True):
            own = scored.setdefault(rollout.group.adapter, {})
            own[rollout.group.event_id] = scored_group(rollout, outcome)
        failures = self.ledger.catalog.attempts.failures
        return tuple(
            account_for(member, scored.get(member.key, {}), failures.get(member.member.pseudonym))
            for member in planned.members
        )

    # Between waves.

    def _is_upkeep_due(self, num_waves: int) -> bool:
        every = (self.settings.evaluation.every_waves, self.settings.retention.every_waves)
        return any(num_waves % number == 0 for number in every)

    def _keep_up(self, pipeline: Pipeline, clock: Clock) -> tuple[list[Verdict], Pipeline]:
        """Evaluations, repacks, checkpoints and compactions, as they are due."""
        settings, verdicts = self.settings, list[Verdict]()
        if self.num_waves % settings.evaluation.every_waves == 0:
            pipeline = self.drain(pipeline)
            verdicts = self.evaluate()
            clock.lap("evaluate")
        if self.num_waves % settings.retention.every_waves == 0:
            pipeline = self.finish_publication(pipeline)
            self.upkeep.repack(RetentionRule(last=settings.retention.last))
            clock.lap("repack")
        if pipeline.publication is None:  # a checkpoint holds all of the log
            self.upkeep.checkpoint(settings.run.checkpoint_every_records)
        self.upkeep.compact(settings.stream.compact_every_segments)
        clock.lap("checkpoint")
        return verdicts, pipeline

    def evaluate(self) -> list[Verdict]:
        """Judge the tips that aren't serving; nothing may be under way beside it."""
        assert not self.ledger.pending.busy(), "a wave is under way"
        return self.examiner.evaluate()

    def _tips_of(self, pseudonyms: Sequence[str]) -> list[AdapterKey]:
        """The slots of users under way: they are named after the tips that they start from."""
        states = [self.ledger.catalog.get(pseudonym) for pseudonym in sorted(pseudonyms)]
        return [AdapterKey(state.pseudonym, state.tip) for state in states if state is not None]
