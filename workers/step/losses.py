"""Advantages and losses. Pure functions; one objective per kind of experience, and all of them
weight one thing: the log-probability of the tokens that were produced.

To add a loss, write its advantages and add a row to `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from populace.configs.schema import TrainSettings
from populace.workers.batch import ExperienceKind, ScoredSample, TrainGroup

MIN_SPREAD = 1e-6


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


Advantages = Callable[[TrainGroup, Baseline, TrainSettings], tuple[list[float], Baseline]]
"""(group, baseline before it) -> one advantage per sample, baseline afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How one kind of experience is learned from."""

    advantages: Advantages
    is_policy_gradient: bool
    """Whether importance weights and the KL term apply; else it is plain likelihood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGroup:
    """A group that has something to teach, with one advantage per sample."""

    group: TrainGroup
    advantages: tuple[float, ...]

    @property
    def is_policy_gradient(self) -> bool:
        return OBJECTIVES[self.group.kind].is_policy_gradient


def weigh_groups(
    groups: Sequence[TrainGroup], baseline: Baseline, train: TrainSettings
) -> tuple[list[WeightedGroup], Baseline]:
    """Advantages of every group in order, and the baseline afterwards. Groups without signal are
    left out."""
    weighted = []
    for group in groups:
        advantages, baseline = OBJECTIVES[group.kind].advantages(group, baseline, train)
        if any(abs(value) > MIN_SPREAD for value in advantages):
            weighted.append(WeightedGroup(group=group, advantages=tuple(advantages)))
    return weighted, baseline


def _group_relative(
    group: TrainGroup, baseline: Baseline, train: TrainSettings
) -> tuple[list[float], Baseline]:
    """GRPO: (r - mean) / std over the group (https://arxiv.org/abs/2402.03300, §4.1.1). Without
    spread there is no signal."""
    rewards = torch.tensor([scored.reward for scored in group.samples], dtype=torch.float64)
    if len(rewards) < 2 or float(rewards.max() - rewards.min()) < MIN_SPREAD:
        return [0.0] * len(rewards), baseline
    if train.kl_in == "reward":
        kl = torch.tensor([_sampled_kl(scored) for scored in group.samples], dtype=torch.float64)
        rewards = rewards - train.kl_coefficient * kl
    spread = rewards.std(correction=0) + 1e-6
    advantages: list[float] = ((rewards - rewards.mean()) / spread).tolist()
    return advantages, baseline


def _against_baseline(
    group: TrainGroup, baseline: Baseline, train: TrainSettings
) -> tuple[list[float], Baseline]:
    """REINFORCE: r - the user's baseline before it (Williams 1992). The first reward has nothing to
    be compared with."""
    reward = group.samples[0].reward
    advantage = reward - baseline.value if baseline.num_rewards else 0.0
    return [advantage], baseline.after(reward, train.baseline_decay)


def _likelihood(
    group: TrainGroup, baseline: Baseline, train: TrainSettings
) -> tuple[list[float], Baseline]:
    """Maximum likelihood: every token counts as one."""
    return [1.0], baseline


OBJECTIVES = {
    ExperienceKind.TASK: Objective(advantages=_group_relative, is_policy_gradient=True),
    ExperienceKind.TRAJECTORY: Objective(advantages=_against_baseline, is_policy_gradient=True),
    ExperienceKind.DEMONSTRATION: Objective(advantages=_likelihood, is_policy_gradient=False),
}


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
    train: TrainSettings,
) -> Tensor:
    """The loss of every target token, [N].

    Policy gradient with truncated importance sampling (w = min(pi / pi_behaviour, C), log-ratio
    bounded at 20; https://fengyao.notion.site/off-policy-rl), likelihood for demonstrations, and
    k2 = (log pi - log base)² / 2, whose gradient is that of the reverse KL on policy
    (http://joschu.net/blog/kl-approx.html). `behaviour_N` and `base_N` are NaN where unknown: no
    correction, no KL.
    """
    # Importance weights: 1 where the behaviour is unknown, and for likelihood.
    log_ratio_N = (logprob_N.detach() - behaviour_N).clamp(-20, 20)
    weight_N = torch.where(
        log_ratio_N.isnan(), 1.0, log_ratio_N.exp().clamp(max=train.importance_cap)
    )
    weight_N = torch.where(policy_gradient_N, weight_N, 1.0)
    loss_N = -weight_N * advantage_N * logprob_N
    # The KL term, where the base's log-probability is known.
    if train.kl_coefficient and train.kl_in == "loss":
        known_N = policy_gradient_N & ~base_N.isnan()
        gap_N = logprob_N - torch.where(known_N, base_N, 0.0)
        loss_N = loss_N + torch.where(known_N, train.kl_coefficient * 0.5 * gap_N.square(), 0.0)
    return loss_N
