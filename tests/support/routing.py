"""Rollouts as lessons, and a router that is disturbed between rollout and training."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from populace.workers.base.gates import Gate
from populace.workers.batch import (
    AdapterBatch,
    ExperienceKind,
    RolloutGroup,
    ScoredSample,
    TrainGroup,
)


class NoisyGate:
    """A gate with relative noise in its selection alone, as other kernels or another engine would
    disturb it: who is chosen changes, not what the chosen count for."""

    def __init__(self, gate: Gate, noise: float, seed: int) -> None:
        self.gate, self.noise, self.w_ED = gate, noise, gate.w_ED
        self._generator = torch.Generator().manual_seed(seed)

    def affinity(self, x_TD: Tensor) -> Tensor:
        affinity_TE = self.gate.affinity(x_TD)
        draws_TE = torch.randn(affinity_TE.shape, generator=self._generator)
        self._noisy_TE = affinity_TE.detach() * (1 + self.noise * draws_TE)
        return affinity_TE

    def select(self, affinity_TE: Tensor) -> Tensor:
        return self.gate.select(self._noisy_TE)

    def weigh(self, affinity_TK: Tensor) -> Tensor:
        return self.gate.weigh(affinity_TK)


def learn_from(group: RolloutGroup, replay: bool) -> AdapterBatch:
    """A rollout as a task to learn from, with or without its routing record."""
    samples = tuple(
        ScoredSample(
            sample=sample if replay else dataclasses.replace(sample, expert_ids=None),
            reward=float(place),
            base_logprobs=None,
        )
        for place, sample in enumerate(group.samples)
    )
    task = TrainGroup(
        event_id=group.event_id,
        kind=ExperienceKind.TASK,
        prompt_ids=group.prompt_ids,
        prompt_expert_ids=group.prompt_expert_ids if replay else None,
        samples=samples,
    )
    return AdapterBatch(adapter=group.adapter, groups=(task,))
