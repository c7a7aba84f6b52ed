"""The waves of one controller, until there is a reason to stop, and the shard group that it keeps
alive meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.controller import EMPTY, Controller
from populace.population.ledger.ownership import Ownership
from populace.population.sampler import shard_settings
from populace.population.watching.views import View
from populace.population.waves.chat import Chat
from populace.population.waves.report import WaveReport
from populace.population.waves.reward_tasks import score_on_ray
from populace.storage.errors import OutcomeUnknown, PopulaceError, StoreUnavailable
from populace.workers.actors.group import ShardGroup, ShardGroupLost
from populace.workers.base.registry import PreparedBase

Result = TypeVar("Result")

IDLE_S = 0.5
REBALANCE_S = 1.0


class StopFlag:
    """Somebody wants a run to end after its wave."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.event = threading.Event()

    def ask(self) -> None:
        """Somebody asked through the store."""
        if not self.event.is_set():
            self.event.set()
            self._view.stage("asked to stop; stopping after this wave")


@contextmanager
def controlling(
    settings: Settings,
    population: Population,
    base: PreparedBase,
    chat: Chat,
    view: View,
    gpus: int,
) -> Iterator[tuple[Controller, SteadyGroup]]:
    """A controller with a shard group of its own, which is loaded; both are gone afterwards.
    `gpus`: that Ray reserves for each shard."""
    own = shard_settings(settings, population.meta, population.store.url, base, chat)
    shards = ShardGroup(own, settings.shard, settings.run.controller, gpus)
    group = SteadyGroup(shards, view)
    try:
        group.wait_until_ready()
        if gpus and shards.computes_on.startswith("cpu"):
            view.stage(
                f"shards compute on {shards.computes_on}, although Ray reserved GPUs for them; "
                "`populace doctor` on their node says why"
            )
        elif shards.computes_on:
            view.stage(f"shards compute on {shards.computes_on}")
        controller = Controller(settings, population.ledger, shards, chat, score_on_ray)
        try:
            yield controller, group
        finally:
            controller.close()
    finally:
        shards.stop()


class SteadyGroup:
    """The shard group as a run sees it: its progress is shown while it loads, and it comes back
    when it dies."""

    def __init__(self, shards: ShardGroup, view: View) -> None:
        self.shards, self._view = shards, view
        self._shown = -1

    def wait_until_ready(self) -> None:
        self._view.stage(f"loading the base into {self.shards.group.count} shards")
        try:
            self.shards.wait_until_ready(self._tick)
        except ShardGroupLost as error:
            self._start_again(error)

    def surviving(self, controller: Controller, call: Callable[[], Result]) -> Result:
        """`call`, once more on a new group as often as the group dies in it."""
        is_new = False
        while True:
            try:
                if is_new:
                    controller.meet_workers()
                return call()
            except ShardGroupLost as error:
                is_new, started = True, time.monotonic()
                self._start_again(error)
                controller.planner.suspects.suspect_unfinished()
                self._view.stage(f"the group is back after {time.monotonic() - started:.1f} s")

    def _start_again(self, error: ShardGroupLost) -> None:
        self._view.restarted()
        self._view.stage(f"{error}; starting the group again")
        self.shards.start_again(self._tick)

    def _tick(self, loaded: int, shards: int) -> None:
        if loaded != self._shown and shards > 1:
            self._shown = loaded
            self._view.stage(f"{loaded} of {shards} shards are loaded")


class Run:
    """Waves until there is a reason to stop, whatever the store and the other controllers do
    meanwhile."""

    def __init__(
        self,
        controller: Controller,
        ownership: Ownership,
        group: SteadyGroup,
        view: View,
        stop: StopFlag,
        is_over: Callable[[], bool],
        *,
        has_mates: bool = False,
        gone: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        """`is_over`: whether the run ends, asked when this controller has nothing to learn from.
        `has_mates`: other controllers are of the same run, which may leave this one without a
        partition; `gone`: those of them that have ended, see `Ownership.rebalance`."""
        self._controller, self._ownership = controller, ownership
        self._group, self._view = group, view
        self._ask_to_stop, self._stop, self._is_over = stop.ask, stop.event, is_over
        self._ledger, self._run = controller.ledger, controller.settings.run
        self._has_mates, self._gone = has_mates, gone
        self._pipeline = EMPTY
        self._looked_s = -REBALANCE_S
        self._given_up: set[int] = set()
        """What this run owned when the store went away."""

    def until_done(self) -> None:
        """A run that ends by itself judges its last tips."""
        while True:
            try:
                self._wait_for_partitions()
                self._ledger.refresh()  # or who owns them would seem to have nothing to do
                self._view.idle(self._controller.state())
                while not self._stop.is_set() and self._has_waves_left() and self._turn():
                    pass
                self._take_back_attempts()
                if not self._stop.is_set():
                    self._judge()
                return
            except (StoreUnavailable, OutcomeUnknown) as error:
                self._wait_for_store(error)

    def _has_waves_left(self) -> bool:
        return self._run.max_waves is None or self._controller.num_waves < self._run.max_waves

    def _judge(self) -> None:
        verdicts = self._group.surviving(self._controller, self._controller.evaluate)
        self._view.decided([*verdicts, *self._controller.take_answered()])
        if verdicts:
            self._view.stage(f"judged {len(verdicts)} tips")

    def _turn(self) -> bool:
        """One wave; False when the run is over."""
        self._share_partitions()
        report = self._group.surviving(self._controller, self._wave)
        if report is not None:
            self._view.wave(report, self._controller.state())
        elif not self._ledger.pending.num_pending() and self._is_over():
            return False
        else:
            if answered := self._controller.take_answered():
                self._view.decided(answered)
            self._view.idle(self._controller.state())
            self._stop.wait(IDLE_S)
        return True

    def _wave(self) -> WaveReport | None:
        """When `run_once` raises, nothing is on its way any more."""
        pipeline, self._pipeline = self._pipeline, EMPTY
        report, self._pipeline = self._controller.run_once(pipeline)
        return report

    def _take_back_attempts(self) -> None:
        self._pipeline = self._controller.take_back_attempts(self._pipeline)

    def _wait_for_partitions(self) -> None:
        """Until something is owned: what a dead run left is taken over, the others are asked to
        share."""
        while not self._stop.is_set():
            self._share_partitions(at_once=True)
            if self._ledger.owned():
                self._given_up.clear()
                return
            if self._has_mates:
                self._view.idle(self._controller.state())
                if self._is_over():
                    return
            self._stop.wait(0.2)

    def _share_partitions(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self._looked_s < REBALANCE_S:
            return
        self._looked_s = now
        claims, releases = self._ownership.rebalance(
            self._run.takeover_s, self._take_back_attempts, self._gone()
        )
        suspects = self._controller.planner.suspects
        suspects.forgive([partition for partition in claims if partition in self._given_up])
        suspects.suspect_unfinished(claims)
        if releases or (claims and len(self._ledger.owned()) < len(self._ledger.readers)):
            self._view.stage(f"this controller owns partitions {self._ledger.owned()}")

    def _wait_for_store(self, error: PopulaceError) -> None:
        """The store is away or full: nothing is lost and nothing can be done. Join anew once it is
        back."""
        self._given_up |= set(self._ledger.owned())
        self._view.paused(error)
        pipeline, self._pipeline = self._pipeline, EMPTY
        self._controller.drop_in_flight(pipeline)
        self._ownership.give_up()
        while not self._stop.wait(self._run.store_retry_s):
            try:
                self._ownership.join(self._run.controller, self._run.takeover_s, self._ask_to_stop)
                self._view.paused(None)
                return
            except (StoreUnavailable, OutcomeUnknown) as still:
                self._ownership.give_up()
                error = still
        raise error
