"""One run of a population: prepare the base, start Ray and the shard group, enqueue, loop, release,
report."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.experience.gateway import Gateway
from populace.population.loop import Run, StopFlag, controlling
from populace.population.replicas.leader import Replicas, team_of
from populace.population.replicas.team import Team
from populace.population.tools.report import write_report
from populace.population.watching.beacon import Beacon
from populace.population.watching.metrics import RayMetrics
from populace.population.watching.views import View, Views
from populace.population.waves.chat import Chat
from populace.population.waves.rewards import find_reward
from populace.storage.errors import InvalidInput
from populace.storage.objects.counted import CountedStore
from populace.storage.objects.open import open_store
from populace.workers.base.registry import PreparedBase, prepare_base


def run_population(settings: Settings, view: View) -> tuple[Population, bool]:
    """Run until drained, `run.max_waves`, the first SIGINT or SIGTERM, or `populace stop`, which
    all end after the current wave. Also returns whether a report was written."""
    started = time.monotonic()
    view = shown = Views(view)
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
    team = team_of(settings, population.meta, population.store.url)
    if team.remark:
        view.stage(team.remark)
    ownership, run = population.ownership, settings.run
    metrics = RayMetrics(settings.name, run.controller, store.take_calls) if run.metrics else View()
    view = Views(shown, Beacon(ownership.show), metrics)
    with metrics, StopSignal(view) as stop:
        view.stage("claiming the population")
        # First: only one controller of a name may take over, or remove, what a run that died has
        # left in the cluster.
        ownership.join(run.controller, run.takeover_s, stop.ask)
        try:
            with _page(settings, population, view):
                if settings.stream.gateway:
                    Gateway.start(population.store.url, settings.name, stream=settings.stream)
                reported = _train(team, population, base, chat, shown, view, stop, started)
        finally:
            ownership.release()
    return population, reported


def _train(
    team: Team,
    population: Population,
    base: PreparedBase,
    chat: Chat,
    shown: View,
    view: View,
    stop: StopSignal,
    started: float,
) -> bool:
    """Place the shards, loop, report; returns whether a report was written. `shown`: what a person
    sees, of all controllers; `view`: of this one, its figures too."""
    settings, ownership = team.settings[0], population.ownership
    drains = settings.run.until_drained

    def is_over() -> bool:
        return replicas.has_finished or (drains and replicas.are_idle(ownership))

    with (
        Replicas(team, base, population.store.url, shown, stop.event) as replicas,
        controlling(settings, population, base, chat, view, team.gpus) as (own, group),
    ):
        replicas.wait_until_ready()
        run = Run(
            own, ownership, group, view, stop, is_over,
            has_mates=not replicas.is_alone, gone=replicas.gone,
        )  # fmt: skip
        run.until_done()
        if not replicas.is_alone:
            replicas.finish(is_drained=drains)
            # What others have left, because they gave up or are done, is this one's now.
            run.until_done()
        if settings.report is None or stop.event.is_set():
            return False
        population.ledger.refresh()
        view.stage("measuring every adapter on every user's held-out tasks")
        folder = Path(settings.report)
        group.surviving(own, lambda: write_report(own, folder, started))
        return True


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


class StopSignal(StopFlag):
    """Turns SIGINT and SIGTERM into a flag; a second one interrupts at once, and loses nothing
    committed."""

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self._before: dict[int, Any] = {}

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
    if not os.environ.get("RAY_ADDRESS", "").strip():
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
