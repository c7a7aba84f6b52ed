"""Verdicts from held-out evidence."""

from __future__ import annotations

import dataclasses

import pytest

from populace.configs.schema import EvaluationSettings
from populace.population.evaluation.verdict import verdict
from populace.storage.catalog.states import AdapterState

GATE = EvaluationSettings(min_tasks=2, too_few="promote", confidence=0.9, tolerance=0.0)


def adapter(tip: int, serving: int) -> AdapterState:
    return AdapterState(
        pseudonym="p", partition=0, spec={}, seed=0, tip=tip, serving=serving,
        next_revision=tip + 1, consumed=(0, 0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tip", "decision", "moves_to"),
    [
        ([0.9, 0.8, 0.9], "promote", (3, 3)),
        ([0.5, 0.5, 0.5], "promote", (3, 3)),
        ([0.1, 0.0, 0.1], "reject", (1, 1)),
        ([0.1, 0.9, 0.4], "keep", (3, 1)),
    ],
)
def test_verdicts_move_serving_or_the_tip(
    tip: list[float], decision: str, moves_to: tuple[int, int]
) -> None:
    names = ["a", "b", "c"]
    record = verdict(
        adapter(3, 1), dict(zip(names, tip, strict=True)), dict.fromkeys(names, 0.5), GATE
    )
    assert (record.decision, (record.tip, record.serving)) == (decision, moves_to)
    assert (
        record.numbers["interval_low"]
        <= record.numbers["difference"]
        <= record.numbers["interval_high"]
    )


def test_too_little_evidence_follows_the_named_policy() -> None:
    for policy, serving in (("promote", 3), ("keep", 1)):
        record = verdict(
            adapter(3, 1), {"a": 0.0}, {"a": 1.0}, dataclasses.replace(GATE, too_few=policy)
        )
        assert (record.decision, record.serving, record.tip) == (policy, serving, 3)
        assert record.reason.startswith("provisional")
