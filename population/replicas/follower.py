"""A controller that is not the leader of its run: a Ray actor with a shard group of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.ledger.ownership import Ownership
from populace.population.loop import Run, StopFlag, controlling
from populace.population.replicas.team import News
from populace.population.watching.beacon import Beacon
from populace.population.watching.metrics import RayMetrics
from populace.population.watching.views import View, Views
from populace.population.waves.chat import Chat
from populace.population.waves.report import RunState, WaveReport
from populace.storage.errors import OwnerAlive, PopulaceError
from populace.storage.identity import PopulationMeta
from populace.storage.log.records import Tombstone, Verdict
from populace.storage.objects.counted import CountedStore
from populace.storage.objects.open import open_store
from populace.workers.base.registry import PreparedBase

ORPHAN_S = 60.0
"""How long a controller of a run that died may still seem alive: Ray ends it with its driver."""


class _Notes(View):
    """What a controller has to say, until somebody asks. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._news = News()
        self.ownership: Ownership | None = None
        """Once it has joined."""

    def take(self) -> News:
        with self._lock:
            news, self._news = self._news, replace(self._news, said=())
            return news

    def is_ready(self) -> None:
        """Its group is loaded."""
        with self._lock:
            self._news = replace(self._news, is_ready=True)

    def stage(self, text: str) -> None:
        self._say("stage", text)

    def wave(self, report: WaveReport, state: RunState) -> None:
        self._is_idle(False)
        self._say("wave", report, state)

    def idle(self, state: RunState) -> None:
        self._is_idle(not state.num_pending)

    def paused(self, error: PopulaceError | None) -> None:
        self._say("paused", error)

    def decided(self, records: Sequence[Verdict | Tombstone]) -> None:
        if records:
            self._say("decided", records)

    def _is_idle(self, is_idle: bool) -> None:
        assert self.ownership is not None
        partitions = frozenset(self.ownership.ledger.owned())
        with self._lock:
            self._news = replace(
                self._news, is_idle=is_idle, owner=self.ownership.owner, partitions=partitions
            )

    def _say(self, hook: str, *arguments: Any) -> None:
        with self._lock:
            self._news = replace(self._news, said=(*self._news.said, (hook, arguments)))


class Follower:
    """A controller that is not the leader, with a shard group of its own."""

    def __init__(self, settings: Settings, base: PreparedBase, gpus: int) -> None:
        self._settings, self._base, self._gpus = settings, base, gpus
        self._notes, self._finished = _Notes(), threading.Event()
        self._stop = StopFlag(self._notes)

    def work(self) -> None:
        """Until it is asked to finish or to stop, or has done its share of the waves."""
        settings, run = self._settings, self._settings.run
        store = CountedStore(open_store(settings.store))
        meta = PopulationMeta.read(store, settings.name)
        # Not by `open`, which refuses the name of a follower.
        population = Population(settings, store, meta)
        ownership = population.ownership
        metrics = (
            RayMetrics(settings.name, run.controller, store.take_calls) if run.metrics else View()
        )
        view = Views(self._notes, Beacon(ownership.show), metrics)
        with metrics:
            self._join(ownership)
            self._notes.ownership = ownership
            try:
                if self._stop.event.is_set():  # before it would load for nothing
                    return
                chat = Chat(self._base.folder)
                with controlling(settings, population, self._base, chat, view, self._gpus) as (
                    controller,
                    group,
                ):
                    self._notes.is_ready()
                    is_over = self._finished.is_set
                    Run(
                        controller, ownership, group, view, self._stop, is_over, has_mates=True
                    ).until_done()
            finally:
                ownership.release()

    def _join(self, ownership: Ownership) -> None:
        """The leader has its name to itself: another controller of this one's is an orphan."""
        run, deadline = self._settings.run, time.monotonic() + ORPHAN_S
        while True:
            try:
                return ownership.join(run.controller, run.takeover_s, self._stop.ask)
            except OwnerAlive:
                if time.monotonic() > deadline:
                    raise

    def news(self) -> News:
        return self._notes.take()

    def finish(self) -> None:
        """End once there is nothing to learn from, its last tips judged."""
        self._finished.set()

    def stop(self) -> None:
        """End after this wave."""
        self._stop.event.set()


RemoteFollower = ray.remote(num_cpus=0, max_restarts=0)(Follower)
