"""The figures of a run as Ray's metrics, and through them Prometheus's. Ray puts `ray_` before
every name and `_total` behind counters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Self

import ray.util.metrics as ray_metrics

from populace.population.watching.figures import (
    METRICS,
    Figure,
    Metric,
    call_figures,
    decision_figures,
    state_figures,
    wave_figures,
)
from populace.population.watching.views import View
from populace.population.waves.report import RunState, WaveReport
from populace.storage.errors import PopulaceError
from populace.storage.log.records import Tombstone, Verdict
from populace.storage.objects.counted import Calls, add_calls

KEEP_S = 1.0
ALMOST_ZERO = 1e-9
"""A rate needs a value to rise from, and Ray's counters refuse zero."""


class RayMetrics(View):
    """Exports what a run tells, as a context manager around it. `take_calls`: the controller's own
    calls to the store since the last time.

    Ray forgets a gauge that isn't set again within two of its report intervals, and a wave or a
    pause takes longer: a thread repeats what was said last."""

    def __init__(self, population: str, controller: str, take_calls: Callable[[], Calls]) -> None:
        self._take_calls = take_calls
        self._metrics = {metric.name: metric for metric in METRICS}
        self._exported = {metric.name: _export(metric) for metric in METRICS}
        for exported in self._exported.values():
            exported.set_default_tags({"population": population, "controller": controller})
        self._gauges: dict[tuple[str, str], float] = {}
        """(name, tag) -> what was said last."""
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._keeper = threading.Thread(
            target=self._keep_gauges, daemon=True, name="populace-metrics"
        )
        for metric in METRICS:
            if metric.kind == "counter":
                for value in metric.values or ("",):
                    self._record(Figure(metric.name, ALMOST_ZERO, value))

    def __enter__(self) -> Self:
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._keeper.join()

    def wave(self, report: WaveReport, state: RunState) -> None:
        for figure in wave_figures(report):
            self._record(figure)
        self._show(state, report.paging.store_calls)

    def idle(self, state: RunState) -> None:
        self._show(state, {})

    def decided(self, records: Sequence[Verdict | Tombstone]) -> None:
        for figure in decision_figures(records):
            self._record(figure)

    def paused(self, error: PopulaceError | None) -> None:
        self._record(Figure("populace_paused", error is not None))
        self._record(Figure("populace_pauses", error is not None))
        self._record_calls({})

    def restarted(self) -> None:
        self._record(Figure("populace_group_restarts", 1))

    def _show(self, state: RunState, calls: Calls) -> None:
        for figure in state_figures(state):
            self._record(figure)
        self._record_calls(calls)

    def _record_calls(self, calls: Calls) -> None:
        for figure in call_figures(add_calls([self._take_calls(), calls])):
            self._record(figure)

    def _record(self, figure: Figure) -> None:
        metric, exported = self._metrics[figure.name], self._exported[figure.name]
        tags = {metric.tag: figure.tag} if metric.tag else None
        match metric.kind:
            case "counter" if figure.value:
                exported.inc(figure.value, tags)
            case "counter":
                pass
            case "gauge":
                with self._lock:
                    self._gauges[figure.name, figure.tag] = figure.value
                    exported.set(figure.value, tags)
            case _:
                exported.observe(figure.value, tags)

    def _keep_gauges(self) -> None:
        while not self._ended.wait(KEEP_S):
            with self._lock:  # also while they are set: an old value must not overtake a new one
                for (name, tag), value in self._gauges.items():
                    tags = {self._metrics[name].tag: tag} if tag else None
                    self._exported[name].set(value, tags)


def _export(metric: Metric) -> Any:
    tags = ("population", "controller", *([metric.tag] if metric.tag else []))
    text = f"{metric.meaning} ({metric.unit})"
    match metric.kind:
        case "counter":
            return ray_metrics.Counter(metric.name, text, tags)
        case "gauge":
            return ray_metrics.Gauge(metric.name, text, tags)
    return ray_metrics.Histogram(metric.name, text, list(metric.boundaries), tags)
