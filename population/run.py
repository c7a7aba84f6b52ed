"""One run of a population: prepare the base, start Ray and the shard group, enqueue, loop, release,
report."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import ray

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.controller import EMPTY, Controller
from populace.population.experience.gateway import Gateway
from populace.population.ledger.ownership import Ownership
from populace.population.sampler import shard_settings
from populace.population.tools.report import write_report
from populace.population.watching.beacon import Beacon
from populace.population.watching.metrics import RayMetrics
from populace.population.watching.views import View, Views
from populace.population.waves.chat import Chat
from populace.population.waves.report import WaveReport
from populace.population.waves.reward_tasks import score_on_ray
from populace.population.waves.rewards import find_reward
from populace.storage.errors import InvalidInput, OutcomeUnknown, PopulaceError, StoreUnavailable
from populace.storage.objects.counted import CountedStore
from populace.storage.objects.open import open_store
from populace.workers.actors.group import ShardGroup, ShardGroupLost
from populace.workers.base.registry import PreparedBase, prepare_base

Result = TypeVar("Result")

IDLE_S = 0.5
REBALANCE_S = 1.0


def run_population(settings: Settings, view: View) -> tuple[Population, bool]:
    """Run until drained, `run.max_waves`, the first SIGINT or SIGTERM, or `populace stop`, which
    all end after the current wave. Also returns whether a report was written."""
    started = time.monotonic()
    # Rewards and experience are modules of the directory that the run starts in.
    sys.path.insert(0, os.getcwd())
    for target in settings.rewards.functions.values():
        find_reward(target)
    experience = None if settings.experience is None else _import_target(settings.experience)
    view.stage(f"base {settings.base.model}")
    base = prepare_base(settings.base.model, view.stage)
    store = CountedStore(open_store(settings.store))
    population = Population.create(store, settings)
    chat = Chat(base.folder)
    if experience is not None:
        num_events = population.enqueue_many(experience(settings))
        view.stage(f"enqueued {num_events} events")
    view.stage("starting Ray")
    start_ray()
    ownership, run = population.ownership, settings.run
    metrics = RayMetrics(settings.name, run.controller, store.take_calls) if run.metrics else View()
    view = Views(view, Beacon(ownership.show), metrics)
    with metrics, StopSignal(view) as stop:
        view.stage("claiming the population")
        # First: only one controller of a name may take over, or remove, what a run that died has
        # left in the cluster.
        ownership.join(run.controller, run.takeover_s, stop.ask)
        try:
            with _page(settings, population, view):
                if settings.stream.gateway:
                    Gateway.start(population.store.url, settings.name, stream=settings.stream)
                reported = _train(settings, population, base, chat, view, stop, started)
        finally:
            ownership.release()
    return population, reported


def _train(
    settings: Settings,
    population: Population,
    base: PreparedBase,
    chat: Chat,
    view: View,
    stop: StopSignal,
    started: float,
) -> bool:
    """Place the shards, loop, report; returns whether a report was written."""
    own = shard_settings(settings, population.meta, population.store.url, base, chat)
    group = _Group(ShardGroup(own, settings.shard, settings.run.controller), view)
    try:
        group.wait_until_ready()
        controller = Controller(settings, population.ledger, group.shards, chat, score_on_ray)
        try:
            _Run(controller, population.ownership, group, view, stop).until_done()
            if settings.report is None or stop.event.is_set():
                return False
            view.stage("measuring every adapter on every user's held-out tasks")
            folder = Path(settings.report)
            group.surviving(controller, lambda: write_report(controller, folder, started))
            return True
        finally:
            controller.close()
    finally:
        group.shards.stop()


@contextlib.contextmanager
def _page(settings: Settings, population: Population, view: View) -> Iterator[None]:
    """The population page beside a run that wants one."""
    page = settings.page
    if not page.enabled:
        yield
        return
    from populace.population.page.serve import serving_page  # Ray Serve takes a second to import

    with contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(
                serving_page(population, page.host, page.port, page.hosts, settings.report or "")
            )
            view.stage(f"the population page is at {address}")
        except Exception as error:  # Ray Serve's own, too: a run goes on without its page
            view.stage(f"no population page: {error}")
        yield


class _Group:
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


class _Run:
    """Waves until there is a reason to stop, whatever the store and the other controllers do
    meanwhile."""

    def __init__(
        self,
        controller: Controller,
        ownership: Ownership,
        group: _Group,
        view: View,
        stop: StopSignal,
    ) -> None:
        self._controller, self._ownership = controller, ownership
        self._group, self._view = group, view
        self._ask_to_stop, self._stop = stop.ask, stop.event
        self._ledger, self._run = controller.ledger, controller.settings.run
        self._pipeline = EMPTY
        self._looked_s = -REBALANCE_S
        self._given_up: set[int] = set()
        """What this run owned when the store went away."""

    def until_done(self) -> None:
        """A run that ends by itself judges its last tips."""
        while True:
            try:
                self._wait_for_partitions()
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
        elif self._run.until_drained and not self._ledger.pending.num_pending():
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
            self._stop.wait(0.2)

    def _share_partitions(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self._looked_s < REBALANCE_S:
            return
        self._looked_s = now
        claims, releases = self._ownership.rebalance(self._run.takeover_s, self._take_back_attempts)
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


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag; a second one interrupts at once, and loses nothing
    committed."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.event = threading.Event()
        self._before: dict[int, Any] = {}

    def ask(self) -> None:
        """Somebody asked through the store."""
        if not self.event.is_set():
            self.event.set()
            self._view.stage("asked to stop; stopping after this wave")

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.event.is_set():
            raise KeyboardInterrupt
        self.event.set()
        self._view.stage("stopping after this wave (once more to stop at once)")


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names (a job has one), or start one for this run."""
    if ray.is_initialized():
        return
    # A shard sets its own threads; Ray would pin a worker to as many as it has CPUs.
    variables = {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    if "POPULACE_KEYS" in os.environ:  # the folder, never a key itself: Ray shows these variables
        variables["POPULACE_KEYS"] = os.environ["POPULACE_KEYS"]
    environment = {"env_vars": variables}
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "warning",
        "runtime_env": environment,
    }
    if "RAY_ADDRESS" not in os.environ:
        # `local`: not whatever cluster happens to run on this machine.
        options |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": max(2, os.cpu_count() or 1),
        }
    ray.init(**options)


def _import_target(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(
            f"experience {target!r} can't be imported: {error}; write it as module:function"
        ) from None
    return function
