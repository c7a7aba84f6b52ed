"""The pure parts: advantages, losses, verdicts, the scheduler, settings, the direction of
imports."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from populace.configs.load import load_settings
from populace.configs.schema import Settings
from populace.population.evaluation.verdict import VerdictPolicy, verdict
from populace.population.experience.events import is_held_out
from populace.population.experience.segments import partition_of
from populace.storage.catalog.states import AdapterState
from populace.workers.batch import Sample, ScoredSample, TrainGroup
from populace.workers.evidence import decode_evidence, encode_evidence
from populace.workers.step.losses import Baseline, LossSettings, token_losses, weigh_groups

ROOT = Path(__file__).parent.parent
LOSS = LossSettings(kl_coefficient=0.1, kl_in_reward=False, importance_cap=2.0, baseline_decay=0.9)


def group(kind: str, *rewards: float, gap: float = 0.0) -> TrainGroup:
    return TrainGroup(
        event_id="e",
        kind=kind,
        prompt_ids=np.arange(3, dtype=np.int32),
        prompt_expert_ids=np.ones((3, 2, 2), np.int16),
        samples=tuple(
            ScoredSample(
                sample=Sample(
                    completion_ids=np.arange(4, dtype=np.int32),
                    logprobs=np.full(4, -1.0 + gap * place, np.float32),
                    expert_ids=None if place else np.ones((3, 2, 2), np.int16),
                    finished=bool(place % 2),
                ),
                reward=reward,
                base_logprobs=np.full(4, -1.0, np.float32),
            )
            for place, reward in enumerate(rewards)
        ),
    )


def test_group_advantages_are_centred_scaled_and_empty_without_spread() -> None:
    (weighted,), _ = weigh_groups([group("task", 0.0, 1.0, 0.5)], Baseline(), LOSS)
    np.testing.assert_allclose(
        weighted.advantages, np.array([-1, 1, 0]) * math.sqrt(1.5), atol=1e-4
    )
    assert weigh_groups([group("task", 0.5, 0.5)], Baseline(), LOSS)[0] == []
    assert weigh_groups([group("task", 0.5)], Baseline(), LOSS)[0] == []


def test_kl_in_the_reward_takes_from_samples_that_left_the_base() -> None:
    settings = dataclasses.replace(LOSS, kl_in_reward=True)
    (weighted,), _ = weigh_groups([group("task", 0.0, 0.1, gap=5.0)], Baseline(), settings)
    assert weighted.advantages[0] > 0 > weighted.advantages[1]


def test_the_baseline_is_the_running_mean_reward() -> None:
    weighted, after = weigh_groups(
        [group("trajectory", r) for r in (0.2, 0.8, 0.5)], Baseline(), LOSS
    )
    assert [w.advantages[0] for w in weighted] == pytest.approx([0.6])  # 0.8 - 0.2, then 0.5 - 0.5
    assert after == Baseline(value=pytest.approx(0.5), num_rewards=3)


def losses(
    logprob: list[float], behaviour: list[float], base: list[float], policy: bool = True
) -> torch.Tensor:
    value = torch.tensor(logprob, requires_grad=True)
    out = token_losses(
        value,
        torch.ones(len(logprob)),
        torch.tensor(behaviour),
        torch.tensor(base),
        torch.full((len(logprob),), policy),
        LOSS,
    )
    (slope,) = torch.autograd.grad(out.sum(), value)
    return slope


def test_importance_weights_are_truncated_and_kl_pulls_to_the_base() -> None:
    nan = math.nan
    # d loss / d logprob = -w·advantage + kl·(logprob - base)
    slopes = losses([-1.0, -1.0, -1.0, -1.0], [-1.0, -5.0, nan, -1.0], [nan, nan, nan, -2.0])
    torch.testing.assert_close(slopes, torch.tensor([-1.0, -2.0, -1.0, -1.0 + 0.1]))


def test_demonstrations_are_plain_likelihood() -> None:
    torch.testing.assert_close(losses([-1.0], [-9.0], [-9.0], policy=False), torch.tensor([-1.0]))


def test_evidence_comes_back_whole() -> None:
    groups = (group("task", 0.0, 1.0), dataclasses.replace(group("trajectory", 0.5), event_id="f"))
    again = decode_evidence(encode_evidence(groups))
    assert encode_evidence(again) == encode_evidence(groups)
    assert [item.kind for item in again] == ["task", "trajectory"]
    np.testing.assert_array_equal(again[0].samples[0].sample.expert_ids, np.ones((3, 2, 2)))
    assert again[0].samples[1].sample.expert_ids is None


POLICY = VerdictPolicy(min_tasks=2, too_few="promote", confidence=0.9, tolerance=0.0)


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
        adapter(3, 1), dict(zip(names, tip, strict=True)), dict.fromkeys(names, 0.5), POLICY
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
            adapter(3, 1), {"a": 0.0}, {"a": 1.0}, dataclasses.replace(POLICY, too_few=policy)
        )
        assert (record.decision, record.serving, record.tip) == (policy, serving, 3)
        assert record.reason.startswith("provisional")


def test_the_heldout_share_is_kept_and_depends_on_the_id_alone() -> None:
    held = [is_held_out(f"event-{number}", b"k" * 32, 0.2) for number in range(5000)]
    assert 0.17 < sum(held) / 5000 < 0.23
    assert held == [is_held_out(f"event-{number}", b"k" * 32, 0.2) for number in range(5000)]


def test_partitions_are_even_and_fixed() -> None:
    counts = np.bincount([partition_of(f"user-{n}", 4) for n in range(4000)], minlength=4)
    assert counts.min() > 850
    assert partition_of("ada", 4) == partition_of("ada", 4)


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/*/*.yaml")]), ids=str
)
def test_every_preset_loads(path: Path) -> None:
    assert isinstance(load_settings(path), Settings)


def test_overrides_win_over_the_file() -> None:
    assert load_settings(ROOT / "configs/tiny.yaml", ["adapter.rank=7"]).adapter.rank == 7


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


ALLOWED = {
    "kernels": ("kernels",),
    "storage": ("storage",),
    "configs": ("configs", "storage.errors"),
    "workers": ("workers", "kernels", "storage", "configs"),
    "population": ("population", "workers", "kernels", "storage", "configs"),
}
MAY_IMPORT_RAY = {
    "workers/actors/shard.py",
    "workers/actors/group.py",
    "population/experience/gateway.py",
    "population/watching/metrics.py",
    "population/page/app.py",
    "population/waves/rewards.py",
    "population/run.py",
}


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way_and_ray_stays_at_the_edges(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        for name in imports(path):
            if name.startswith("populace."):
                inner = name.removeprefix("populace.")
                assert any(inner == ok or inner.startswith(ok + ".") for ok in ALLOWED[folder]), (
                    path,
                    name,
                )
            if name == "ray" or name.startswith("ray."):
                assert str(path.relative_to(ROOT)) in MAY_IMPORT_RAY, (path, name)
