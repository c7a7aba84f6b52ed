"""Advantages and losses. Pure functions; one loss per kind of experience, and all of them weight
one thing: the log-probability of the tokens that were produced.

Suffixes: N tokens that count, G samples of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from populace.workers.batch import ScoredSample, TrainGroup

MIN_SPREAD = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """See configs/schema.py, TrainSettings."""

    kl_coefficient: float
    kl_in_reward: bool
    importance_cap: float
    baseline_decay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A user's running mean reward over logged trajectories."""

    value: float = 0.0
    num_rewards: int = 0

    def after(self, reward: float, decay: float) -> Baseline:
        """Exponential mean, exact mean while young: the first reward is not compared with an
        invented zero."""
        weight = max(1 - decay, 1 / (self.num_rewards + 1))
        return Baseline(
            value=self.value + weight * (reward - self.value), num_rewards=self.num_rewards + 1
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGroup:
    """A group that has something to teach: one coefficient per sample, and whether it is policy
    gradient."""

    group: TrainGroup
    advantages: tuple[float, ...]


def weigh_groups(
    groups: Sequence[TrainGroup], baseline: Baseline, settings: LossSettings
) -> tuple[list[WeightedGroup], Baseline]:
    """Advantages of every group in order, and the baseline afterwards. Groups without signal are
    left out.

    task: GRPO, (r - mean) / std over the group (https://arxiv.org/abs/2402.03300, §4.1.1); no
    spread, no signal. trajectory: REINFORCE, r - the user's baseline before it; the first has
    nothing to be compared with. demonstration: likelihood, coefficient 1.
    """
    weighted = []
    for group in groups:
        match group.kind:
            case "task":
                advantages = _group_advantages(group.samples, settings)
            case "trajectory":
                reward = group.samples[0].reward
                advantages = [reward - baseline.value if baseline.num_rewards else 0.0]
                baseline = baseline.after(reward, settings.baseline_decay)
            case _:
                advantages = [1.0]
        if any(abs(value) > MIN_SPREAD for value in advantages):
            weighted.append(WeightedGroup(group=group, advantages=tuple(advantages)))
    return weighted, baseline


def _group_advantages(samples: Sequence[ScoredSample], settings: LossSettings) -> list[float]:
    rewards = torch.tensor([scored.reward for scored in samples], dtype=torch.float64)
    if len(rewards) < 2 or float(rewards.max() - rewards.min()) < MIN_SPREAD:
        return [0.0] * len(samples)
    if settings.kl_in_reward:
        rewards = rewards - settings.kl_coefficient * torch.tensor(
            [_sampled_kl(scored) for scored in samples], dtype=torch.float64
        )
    advantages: list[float] = (
        (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
    ).tolist()
    return advantages


def _sampled_kl(scored: ScoredSample) -> float:
    """k1 estimate of KL(policy, base) over one completion, in nats."""
    if scored.base_logprobs is None or scored.sample.logprobs is None:
        return 0.0
    return float((scored.sample.logprobs - scored.base_logprobs).sum())


def token_losses(
    logprob_N: Tensor,
    advantage_N: Tensor,
    behaviour_N: Tensor,
    base_N: Tensor,
    policy_gradient_N: Tensor,
    settings: LossSettings,
) -> Tensor:
    """The loss of every token, [N].

    Policy gradient with truncated importance sampling (w = min(pi / pi_behaviour, C), log-ratio
    bounded at 20; https://fengyao.notion.site/off-policy-rl), likelihood for demonstrations, and k2
    = (log pi - log base)² / 2, whose gradient is that of the reverse KL on policy
    (http://joschu.net/blog/kl-approx.html). `behaviour_N` and `base_N` are NaN where unknown: no
    correction, no KL.
    """
    log_ratio_N = (logprob_N.detach() - behaviour_N).clamp(-20, 20)
    weight_N = torch.where(
        log_ratio_N.isnan(), 1.0, log_ratio_N.exp().clamp(max=settings.importance_cap)
    )
    weight_N = torch.where(policy_gradient_N, weight_N, 1.0)
    loss_N = -weight_N * advantage_N * logprob_N
    if settings.kl_coefficient and not settings.kl_in_reward:
        known_N = policy_gradient_N & ~base_N.isnan()
        gap_N = logprob_N - torch.where(known_N, base_N, 0.0)
        loss_N = loss_N + torch.where(known_N, settings.kl_coefficient * 0.5 * gap_N.square(), 0.0)
    return loss_N
