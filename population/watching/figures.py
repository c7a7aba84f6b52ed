"""What a run exports: the one table of metrics, and the figures of a wave, a decision, a state.

`METRICS` has every name with its unit and meaning: `docs/reference/metrics.md` is made from it, and
`metrics.py` exports nothing else. Tags have few values; a user is never one. To add a metric, write
its row here and yield its figure below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from populace.population.waves.report import RunState, WaveReport, change_of
from populace.storage.log.records import Tombstone, Verdict
from populace.storage.objects.counted import Calls

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)

ADAPTERS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One exported name. Every one is also tagged with `population` and `controller`."""

    name: str
    kind: str
    """counter, gauge or histogram."""
    unit: str
    meaning: str
    tag: str = ""
    values: tuple[str, ...] = ()
    """Values that the tag can have."""
    boundaries: tuple[float, ...] = ()


METRICS = (
    Metric(name="populace_waves", kind="counter", unit="waves", meaning="Waves that were trained."),
    Metric(
        name="populace_adapter_changes",
        kind="counter",
        unit="changes",
        meaning="Adapter churn: revisions committed, and what verdicts and commands did to them.",
        tag="change",
        values=(
            "committed",
            "promote",
            "keep",
            "reject",
            "rollback",
            "pin",
            "unpin",
            "refused",
            "forgotten",
        ),
    ),
    Metric(
        name="populace_trained_events",
        kind="counter",
        unit="events",
        meaning="Experience that revisions learned from.",
    ),
    Metric(
        name="populace_settled_events",
        kind="counter",
        unit="events",
        meaning="Experience that ended without a revision, by kind of reason.",
        tag="reason",
        values=("parked", "no signal", "not finite", "stale", "rejected"),
    ),
    Metric(
        name="populace_tokens",
        kind="counter",
        unit="tokens",
        meaning="Completion tokens that steps learned from.",
    ),
    Metric(
        name="populace_wave_adapters",
        kind="histogram",
        unit="adapters",
        meaning="Adapters that one fused step updated.",
        boundaries=ADAPTERS,
    ),
    Metric(
        name="populace_wave_seconds",
        kind="histogram",
        unit="s",
        meaning="Wall time of one turn of the loop, upkeep included.",
        boundaries=SECONDS,
    ),
    Metric(
        name="populace_phase_seconds",
        kind="histogram",
        unit="s",
        meaning=(
            "What a turn waited for each phase; `page`: what the wave's rollouts waited for "
            "adapters' bytes."
        ),
        tag="phase",
        values=(
            "plan",
            "page",
            "rollout",
            "score",
            "train",
            "publish",
            "evaluate",
            "repack",
            "checkpoint",
        ),
        boundaries=SECONDS,
    ),
    Metric(
        name="populace_reward",
        kind="gauge",
        unit="reward",
        meaning="Mean reward of the last wave's rollouts.",
    ),
    Metric(
        name="populace_step_efficiency",
        kind="gauge",
        unit="share",
        meaning=(
            "Of the last fused step's rows, those that were tokens to learn from, not "
            "prompts or padding."
        ),
    ),
    Metric(
        name="populace_rollout_kl",
        kind="gauge",
        unit="nats/token",
        meaning=(
            "KL between rollout and trainer in the last wave: how far the two disagree about "
            "the same tokens."
        ),
    ),
    Metric(
        name="populace_masked_share",
        kind="gauge",
        unit="share",
        meaning=(
            "Of the last wave's tokens, those left out of the loss because their routing is "
            "unknown."
        ),
    ),
    Metric(
        name="populace_out_of_route",
        kind="gauge",
        unit="share",
        meaning=(
            "Of the last wave's replayed expert selections, those that the trainer would "
            "have made otherwise."
        ),
    ),
    Metric(
        name="populace_pending_events",
        kind="gauge",
        unit="events",
        meaning="Experience that waits to be trained.",
    ),
    Metric(
        name="populace_oldest_wait_seconds",
        kind="gauge",
        unit="s",
        meaning="How long the user who has waited longest has waited for an update.",
    ),
    Metric(
        name="populace_partitions",
        kind="gauge",
        unit="partitions",
        meaning="Partitions that the controller owns.",
    ),
    Metric(
        name="populace_adapters",
        kind="gauge",
        unit="adapters",
        meaning=(
            "Residency: adapters in slots (hot), in a shard's memory (warm), blobs on its "
            "disk (near); store: all."
        ),
        tag="tier",
        values=("hot", "warm", "near", "store"),
    ),
    Metric(
        name="populace_paged_adapters",
        kind="counter",
        unit="adapters",
        meaning="Where the adapters of waves were found.",
        tag="tier",
        values=("hot", "new", "warm", "prefetched", "near", "cold"),
    ),
    Metric(
        name="populace_store_calls",
        kind="counter",
        unit="calls",
        meaning="Calls to the store, of the controller and its shards, as operation/outcome.",
        tag="call",
        values=tuple(
            f"{operation}/{outcome}"
            for operation in ("put", "create", "get", "get_range", "list", "delete", "head")
            for outcome in ("ok", "exists", "absent", "unknown", "unavailable", "refused")
        ),
    ),
    Metric(
        name="populace_store_seconds",
        kind="counter",
        unit="s",
        meaning=(
            "Time spent in calls to the object store; over the number of calls, their mean latency."
        ),
        tag="operation",
        values=("put", "create", "get", "get_range", "list", "delete", "head"),
    ),
    Metric(
        name="populace_paused",
        kind="gauge",
        unit="0 or 1",
        meaning="Whether the run waits because its object store is away or full.",
    ),
    Metric(
        name="populace_pauses",
        kind="counter",
        unit="pauses",
        meaning="How often a wave was given up for that.",
    ),
    Metric(
        name="populace_group_restarts",
        kind="counter",
        unit="restarts",
        meaning="How often the shard group died and was started again.",
    ),
)


class Figure(NamedTuple):
    """One value for one metric."""

    name: str
    value: float
    tag: str = ""


def wave_figures(report: WaveReport) -> Iterator[Figure]:
    """What a wave adds."""
    yield Figure("populace_waves", 1)
    yield Figure("populace_adapter_changes", report.num_revisions, "committed")
    yield from decision_figures([*report.verdicts, *report.answered])
    yield Figure("populace_trained_events", report.num_trained)
    yield from (
        Figure("populace_settled_events", count, reason) for reason, count in report.settled.items()
    )
    yield Figure("populace_tokens", report.num_tokens)
    yield Figure("populace_wave_adapters", report.num_adapters)
    yield Figure("populace_wave_seconds", sum(report.seconds.values()))
    phases = {"page": report.paging.waited_s, **report.seconds}
    yield from (
        Figure("populace_phase_seconds", seconds, phase) for phase, seconds in phases.items()
    )
    last = {
        "populace_reward": report.mean_reward,
        "populace_step_efficiency": report.num_targets / report.num_rows
        if report.num_rows
        else None,
        "populace_rollout_kl": report.rollout_kl,
        "populace_masked_share": report.masked_share,
        "populace_out_of_route": report.out_of_route,
    }
    yield from (Figure(name, value) for name, value in last.items() if value is not None)
    tiers = {
        "hot": len(report.paging.hot),
        "warm": report.paging.num_warm,
        "near": report.paging.num_near,
    }
    yield from (Figure("populace_adapters", count, tier) for tier, count in tiers.items())
    yield from (
        Figure("populace_paged_adapters", count, tier)
        for tier, count in report.paging.found.items()
    )


def decision_figures(records: Sequence[Verdict | Tombstone]) -> Iterator[Figure]:
    changes = Counter(change_of(record) for record in records)
    yield from (
        Figure("populace_adapter_changes", count, change) for change, count in changes.items()
    )


def state_figures(state: RunState) -> Iterator[Figure]:
    """What is true now, wave or not."""
    yield Figure("populace_pending_events", state.num_pending)
    yield Figure("populace_oldest_wait_seconds", state.oldest_wait_s)
    yield Figure("populace_partitions", state.num_partitions)
    yield Figure("populace_adapters", state.num_adapters, "store")
    yield Figure("populace_paused", 0)


def call_figures(calls: Calls) -> Iterator[Figure]:
    for (operation, outcome), (count, seconds) in calls.items():
        yield Figure("populace_store_calls", count, f"{operation}/{outcome}")
        yield Figure("populace_store_seconds", seconds, operation)
