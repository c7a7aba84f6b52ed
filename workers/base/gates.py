"""The routers of the supported families: which experts a row goes to, and with which weights.

Every gate is three steps, so that routing replay can override the middle one: `affinity` of every
expert, `select`, and `weigh` the selected affinities. Gradients flow through the first and the
last.

Suffixes: T rows, E experts, K experts per token, D hidden, G groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, softmax


class Gate(Protocol):
    w_ED: Tensor

    def affinity(self, x_TD: Tensor) -> Tensor:
        """[T, E] fp32."""

    def select(self, affinity_TE: Tensor) -> Tensor:
        """[T, K] expert ids, in any order."""

    def weigh(self, affinity_TK: Tensor) -> Tensor:
        """What the outputs of the selected experts are multiplied with, [T, K]."""


@dataclass(slots=True, kw_only=True)
class SoftmaxGate:
    """Mixtral, Qwen3-MoE, OLMoE: softmax over all experts, the largest K, normalised again or
    not."""

    w_ED: Tensor
    top_k: int
    normalise: bool

    def affinity(self, x_TD: Tensor) -> Tensor:
        return softmax(linear(x_TD, self.w_ED), dim=-1, dtype=torch.float32)

    def select(self, affinity_TE: Tensor) -> Tensor:
        return torch.topk(affinity_TE, self.top_k, dim=-1).indices

    def weigh(self, affinity_TK: Tensor) -> Tensor:
        return affinity_TK / affinity_TK.sum(-1, keepdim=True) if self.normalise else affinity_TK


@dataclass(slots=True, kw_only=True)
class GroupLimitedGate:
    """DeepSeek-V3 and Kimi-K2 (https://arxiv.org/abs/2412.19437, section 2.1.2): sigmoid
    affinities; a bias that only selects; of G groups of experts the best by the sum of their two
    largest; normalised and scaled."""

    w_ED: Tensor
    bias_E: Tensor
    top_k: int
    num_groups: int
    top_groups: int
    normalise: bool
    scale: float

    def affinity(self, x_TD: Tensor) -> Tensor:
        return linear(x_TD.float(), self.w_ED.float()).sigmoid()

    def select(self, affinity_TE: Tensor) -> Tensor:
        choice_TGE = (affinity_TE + self.bias_E).view(len(affinity_TE), self.num_groups, -1)
        best_TG = choice_TGE.topk(2, dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(best_TG, dtype=torch.bool)
        kept_TG.scatter_(1, best_TG.topk(self.top_groups, dim=-1).indices, True)
        choice_TE = choice_TGE.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).flatten(1)
        return choice_TE.topk(self.top_k, dim=-1).indices

    def weigh(self, affinity_TK: Tensor) -> Tensor:
        if self.normalise:
            affinity_TK = affinity_TK / (affinity_TK.sum(-1, keepdim=True) + 1e-20)
        return affinity_TK * self.scale
