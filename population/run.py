"""One run of a population: prepare the base, start Ray and the shard group, enqueue, loop, release, report."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import ray
from rich.markup import escape

from populace.configs.schema import Settings
from populace.population.chat import Chat
from populace.population.client import Population
from populace.population.controller import Controller
from populace.population.live import View
from populace.population.report import write_report
from populace.population.rewards import find_reward, score_on_ray
from populace.storage.errors import InvalidInput
from populace.workers.group import ShardGroup, ShardGroupLost
from populace.workers.prepare import prepare_base

Result = TypeVar("Result")

IDLE_S = 1.0


def run_population(settings: Settings, view: View) -> tuple[Population, bool]:
    """Run until drained, `run.max_waves`, or the first SIGINT or SIGTERM, which ends after the current wave.
    Also returns whether a report was written."""
    started, reported = time.monotonic(), False
    sys.path.insert(0, os.getcwd())  # rewards and experience are modules of the directory the run starts in
    for target in settings.rewards.functions.values():
        find_reward(target)
    experience = None if settings.experience is None else _import_target(settings.experience)
    view.stage(f"base {settings.base.model}")
    base = prepare_base(settings.base.model, view.stage)
    population = Population.create(settings.store, settings)
    chat = Chat(base.folder)
    if experience is not None:
        num_events = population.enqueue_many(experience(settings))
        view.stage(f"enqueued {num_events} events")
    view.stage("starting Ray")
    _start_ray()
    ledger = population.ledger
    ledger.refresh()
    with _StopSignal(view) as stop:
        view.stage("claiming the population")
        # Before the shards: only the owner may take over or remove those of a run that died.
        ledger.claim(settings.run.takeover_s)
        try:
            group = _Group(ShardGroup(population.shard_settings(base, chat), settings.shard), view)
            try:
                group.wait_until_ready()
                controller = Controller(settings, ledger, group.shards, chat, score_on_ray)
                _loop(controller, group, settings, view, stop)
                if settings.report is not None and not stop.is_set():
                    view.stage("measuring every adapter on every user's held-out tasks")
                    group.surviving(controller, lambda: write_report(controller, Path(settings.report or ""), started))
                    reported = True
            finally:
                group.shards.stop()
        finally:
            ledger.release()
    return population, reported


class _Group:
    """The shard group as a run sees it: it loads with a sign of life, and comes back when it dies."""

    def __init__(self, shards: ShardGroup, view: View) -> None:
        self.shards, self._view = shards, view
        self._shown = -1

    def wait_until_ready(self) -> None:
        self._view.stage(f"loading the base into {self.shards.group.count} shards")
        try:
            self.shards.wait_until_ready(self._tick)
        except ShardGroupLost as error:
            self._view.stage(f"{escape(str(error))}; starting the group again")
            self.shards.start_again(self._tick)

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
                self._view.stage(f"{escape(str(error))}; starting the group again")
                self.shards.start_again(self._tick)
                if self.shards.num_restarts > 1:
                    controller.suspect_unfinished()
                self._view.stage(f"the group is back after {time.monotonic() - started:.1f} s")

    def _tick(self, loaded: int, shards: int) -> None:
        if loaded != self._shown and shards > 1:
            self._shown = loaded
            self._view.stage(f"{loaded} of {shards} shards are loaded")


def _loop(controller: Controller, group: _Group, settings: Settings, view: View, stop: threading.Event) -> None:
    """Waves until there is a reason to stop; a run that ends by itself judges its last tips."""
    while not stop.is_set():
        if settings.run.max_waves is not None and controller.num_waves >= settings.run.max_waves:
            break
        report = group.surviving(controller, controller.run_once)
        if report is not None:
            view.wave(report, controller)
        elif settings.run.until_drained:
            break
        else:
            stop.wait(IDLE_S)
    if not stop.is_set() and (verdicts := group.surviving(controller, controller.examiner.evaluate)):
        view.stage(f"judged {len(verdicts)} tips")


class _StopSignal:
    """Turns SIGINT and SIGTERM into a flag; a second one interrupts at once, and loses nothing committed."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._event = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> threading.Event:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self._event

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()
        self._view.stage("stopping after this wave (once more to stop at once)")


def _start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names (a job has one), or start one for this run."""
    if ray.is_initialized():
        return
    # A shard sets its own threads; Ray would pin a worker to as many as it has CPUs.
    variables = {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    if "POPULACE_KEYS" in os.environ:  # the folder, never a key itself: Ray shows these variables
        variables["POPULACE_KEYS"] = os.environ["POPULACE_KEYS"]
    environment = {"env_vars": variables}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning", "runtime_env": environment}
    if "RAY_ADDRESS" not in os.environ:
        options |= {"include_dashboard": False, "num_cpus": max(2, os.cpu_count() or 1)}
    ray.init(**options)


def _import_target(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(f"experience {target!r} can't be imported: {error}; write it as module:function") from None
    return function
