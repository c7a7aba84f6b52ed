"""`python -m tests.benchmarks.metrics`: what metrics and live figures cost a wave, with and without
in one run.

Waves alternate, with what follows a run and without, on the same population; the fused step is
small, so that the share is larger than on a real base. About two minutes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.watching.beacon import Beacon
from populace.population.watching.figures import Figure as MetricFigure
from populace.population.watching.metrics import KEEP_S, RayMetrics
from populace.population.watching.views import Views
from populace.population.waves.reward_tasks import score_on_ray
from populace.storage.objects.cloud import MemoryStore
from populace.storage.objects.counted import CountedStore
from populace.storage.objects.open import open_store
from populace.workers.actors.group import ShardGroup
from tests.benchmarks.figures import Figure, figure, publish
from tests.benchmarks.streams import build_base, local_ray, overlap_events, overlap_settings
from tests.support.loops import Loop, chat_of, settings_of

PAIRS = 40
BLOCKS = 5


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="populace-metrics-"))
    os.environ["POPULACE_KEYS"] = str(folder / "keys")
    try:
        with local_ray():
            figures = overhead_figures(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    publish("metrics", figures, Path("build/bench/metrics.json"))


def overhead_figures(folder: Path) -> list[Figure]:
    settings = dataclasses.replace(
        overlap_settings(build_base(folder / "base"), False), store=f"file://{folder}/store"
    )
    store = CountedStore(open_store(settings.store))
    population = Population.create(store, settings)
    population.enqueue_many(overlap_events(num_users=32 * 24, per_user=8))
    population.ownership.join("main", settings.run.takeover_s)
    controller, group = start(settings, population)
    metrics = RayMetrics(settings.name, "main", store.take_calls)
    views = Views(Beacon(population.ownership.show), metrics)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    told: list[float] = []
    num_calls: list[int] = []
    for turn in range(2 * PAIRS + 4):
        is_on = (turn + turn // 2) % 2 == 0  # on, off, off, on: a drift falls on both
        began = time.perf_counter()
        report = controller.wave()
        assert report is not None and report.num_adapters == 32
        waved = time.perf_counter()
        if is_on:
            num_calls.append(sum(count for count, _ in store._calls.values()))
            views.wave(report, controller.state())
        ended = time.perf_counter()
        if turn >= 4:  # the first ones start reward workers
            seconds[is_on].append(ended - began)
            if is_on:
                told.append((ended - waved) / (ended - began))
    began = time.perf_counter()
    for (name, tag), value in list(metrics._gauges.items()):
        metrics._record(MetricFigure(name, value, tag))
    repeating = (time.perf_counter() - began) / KEEP_S
    population.ownership.release()
    group.stop()
    controller.close()
    blocks = [
        [sum(own[n::BLOCKS]) for own in (seconds[True], seconds[False])] for n in range(BLOCKS)
    ]
    per_call_s, wave_s = counting_s(), sum(seconds[False]) / len(seconds[False])
    return [
        figure("a wave, without", seconds[False], "s"),
        figure("a wave, with over without", [on / off for on, off in blocks], "x"),
        figure("share of a wave that goes into telling", told, "share", at_most=0.01),
        figure("share of a wave that goes into counting store calls",
               [count * per_call_s / wave_s for count in num_calls[2:]], "share", at_most=0.01),
        figure("share of a CPU that repeats gauges", [repeating], "share", at_most=0.01),
    ]  # fmt: skip


def start(settings: Settings, population: Population) -> tuple[Loop, ShardGroup]:
    chat = chat_of(population)
    group = ShardGroup(settings_of(population), settings.shard)
    group.wait_until_ready()
    while len(population.ledger.owned()) < population.meta.partitions:
        population.ownership.rebalance(settings.run.takeover_s, lambda: None)
    return Loop(population, group, chat, score_on_ray), group


def counting_s(num_calls: int = 20_000) -> float:
    """What `CountedStore` adds to one call."""

    def race(store: MemoryStore | CountedStore) -> float:
        began = time.perf_counter()
        for _ in range(num_calls):
            store.head("key")
        return time.perf_counter() - began

    plain = MemoryStore()
    plain.put("key", b"x")
    counted = CountedStore(plain)
    gaps: Sequence[float] = sorted(race(counted) - race(plain) for _ in range(5))
    return max(0.0, gaps[2]) / num_calls


if __name__ == "__main__":
    main()
