"""Held-out evidence -> verdict. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist, fmean, stdev

from populace.configs.schema import EvaluationSettings
from populace.storage.catalog.states import AdapterState
from populace.storage.log.records import Decision, Verdict


def verdict(
    adapter: AdapterState,
    tip: Mapping[str, float],
    serving: Mapping[str, float],
    settings: EvaluationSettings,
) -> Verdict:
    """Compare the tip with what serves on the same held-out tasks (task id -> mean reward).

    promote: the tip is at least as good on average; serving moves to it. reject: the whole
    confidence interval of the paired difference lies below minus the tolerance; the tip falls back
    to serving. keep: neither.
    """
    tasks = sorted(tip.keys() & serving.keys())
    if len(tasks) < settings.min_tasks:
        is_promoted = settings.too_few == "promote"
        return _decided(
            adapter,
            Decision.PROMOTE if is_promoted else Decision.KEEP,
            f"provisional: {len(tasks)} held-out tasks, {settings.min_tasks} wanted",
            {"num_tasks": float(len(tasks))},
        )
    differences = [tip[task] - serving[task] for task in tasks]
    mean = fmean(differences)
    spread = stdev(differences) if len(differences) > 1 else 0.0
    quantile = NormalDist().inv_cdf(0.5 + settings.confidence / 2)
    half = quantile * spread / math.sqrt(len(differences))
    if mean + half < -settings.tolerance:
        decision = Decision.REJECT
    else:
        decision = Decision.PROMOTE if mean >= 0 else Decision.KEEP
    return _decided(
        adapter,
        decision,
        f"tip {adapter.tip} against serving {adapter.serving} on {len(tasks)} held-out tasks",
        {
            "tip_reward": fmean(tip[task] for task in tasks),
            "serving_reward": fmean(serving[task] for task in tasks),
            "difference": mean,
            "interval_low": mean - half,
            "interval_high": mean + half,
            "num_tasks": float(len(tasks)),
        },
    )


def _decided(
    adapter: AdapterState, decision: Decision, reason: str, numbers: dict[str, float]
) -> Verdict:
    """The record of a decision about the tip, and where tip and serving are after it."""
    return Verdict(
        pseudonym=adapter.pseudonym,
        decision=decision,
        judged=adapter.tip,
        tip=adapter.serving if decision is Decision.REJECT else adapter.tip,
        serving=adapter.tip if decision is Decision.PROMOTE else adapter.serving,
        reason=reason,
        numbers=numbers,
    )
