"""Advantages, baselines and token losses: the pure part of a step."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from populace.configs.schema import TrainSettings
from populace.workers.step.losses import Baseline, token_losses, weigh_groups
from tests.support.groups import group

LOSS = TrainSettings(kl_coefficient=0.1, kl_in="loss", importance_cap=2.0, baseline_decay=0.9)


def test_group_advantages_are_centred_scaled_and_empty_without_spread() -> None:
    (weighted,), _ = weigh_groups([group("task", 0.0, 1.0, 0.5)], Baseline(), LOSS)
    np.testing.assert_allclose(
        weighted.advantages, np.array([-1, 1, 0]) * math.sqrt(1.5), atol=1e-4
    )
    assert weigh_groups([group("task", 0.5, 0.5)], Baseline(), LOSS)[0] == []
    assert weigh_groups([group("task", 0.5)], Baseline(), LOSS)[0] == []


def test_kl_in_the_reward_takes_from_samples_that_left_the_base() -> None:
    settings = dataclasses.replace(LOSS, kl_in="reward")
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
