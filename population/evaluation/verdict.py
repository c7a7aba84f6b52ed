"""Held-out evidence -> verdict. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from populace.storage.catalog.states import AdapterState
from populace.storage.log.records import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictPolicy:
    """See configs/schema.py, EvaluationSettings."""

    min_tasks: int
    too_few: str
    confidence: float
    tolerance: float


def verdict(
    adapter: AdapterState,
    tip: Mapping[str, float],
    serving: Mapping[str, float],
    policy: VerdictPolicy,
) -> Verdict:
    """Compare the tip with what serves on the same held-out tasks (task id -> mean reward).

    promote: the tip is at least as good on average; serving moves to it. reject: the whole
    confidence interval of the paired difference lies below minus the tolerance; the tip falls back
    to serving. keep: neither.
    """
    tasks = sorted(tip.keys() & serving.keys())
    if len(tasks) < policy.min_tasks:
        promoted = policy.too_few == "promote"
        return Verdict(
            pseudonym=adapter.pseudonym,
            decision="promote" if promoted else "keep",
            judged=adapter.tip,
            tip=adapter.tip,
            serving=adapter.tip if promoted else adapter.serving,
            reason=f"provisional: {len(tasks)} held-out tasks, {policy.min_tasks} wanted",
            numbers={"num_tasks": float(len(tasks))},
        )
    gaps = [tip[task] - serving[task] for task in tasks]
    mean = fmean(gaps)
    spread = stdev(gaps) if len(gaps) > 1 else 0.0
    half = NormalDist().inv_cdf(0.5 + policy.confidence / 2) * spread / math.sqrt(len(gaps))
    numbers = {
        "tip_reward": fmean(tip[task] for task in tasks),
        "serving_reward": fmean(serving[task] for task in tasks),
        "difference": mean,
        "interval_low": mean - half,
        "interval_high": mean + half,
        "num_tasks": float(len(tasks)),
    }
    if mean + half < -policy.tolerance:
        decision, new_tip, new_serving = "reject", adapter.serving, adapter.serving
    elif mean >= 0:
        decision, new_tip, new_serving = "promote", adapter.tip, adapter.tip
    else:
        decision, new_tip, new_serving = "keep", adapter.tip, adapter.serving
    return Verdict(
        pseudonym=adapter.pseudonym,
        decision=decision,
        judged=adapter.tip,
        tip=new_tip,
        serving=new_serving,
        reason=f"tip {adapter.tip} against serving {adapter.serving} on {len(tasks)} held-out tasks",
        numbers=numbers,
    )
