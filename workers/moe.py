"""The MoE block: route, sort rows by (expert, slot), one grouped base product with LoRA inside, un-sort.

Routing can be replayed (R3, https://arxiv.org/abs/2510.11370): the selection comes from the rollout, the scores
are computed anew by the family's own gate, so gradients still flow through them.

Suffixes: T rows, E experts, K experts per token, R = T·K routed rows, D hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear, softmax

from populace.kernels.lora import add_lora
from populace.kernels.tiles import plan_segments
from populace.workers.step import Step, StepHolder


class MoeBlock(nn.Module):
    """Takes the place of a family's sparse MoE block (softmax gate; Mixtral, Qwen3-MoE) and uses its tensors."""

    def __init__(self, block: nn.Module, layer: int, top_k: int, normalise: bool, holder: StepHolder) -> None:
        super().__init__()
        self.gate_ED: Tensor = block.gate.weight.data  # type: ignore[union-attr,assignment]
        self.gate_up_EOD: Tensor = block.experts.gate_up_proj.data  # type: ignore[union-attr,assignment]
        self.down_EDI: Tensor = block.experts.down_proj.data  # type: ignore[union-attr,assignment]
        self.act_fn: Any = block.experts.act_fn  # type: ignore[union-attr]
        self.layer, self.top_k, self.normalise, self.holder = layer, top_k, normalise, holder
        self.num_experts = len(self.gate_ED)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, D]."""
        step = self.holder.step
        x_TD = hidden_states[0]
        ids_TK, score_TK = self._route(x_TD, step)
        expert_R = ids_TK.reshape(-1)
        # Rows come sorted by slot and a stable sort keeps that order inside each expert.
        order_R = torch.argsort(expert_R, stable=True)
        row_R = order_R // self.top_k
        ends_E = torch.bincount(expert_R, minlength=self.num_experts).cumsum(0).to(torch.int32)
        plan = plan_segments(step.rows.arena_T[row_R], step.rows.slot_T[row_R], expert_R[order_R])

        x_RD = x_TD[row_R]
        gate_RI, up_RI = grouped_mm(x_RD, self.gate_up_EOD.transpose(1, 2), offs=ends_E).chunk(2, dim=1)
        gate_RI = add_lora(gate_RI, x_RD, step.lora("gate_proj", self.layer), plan, step.backend)
        up_RI = add_lora(up_RI, x_RD, step.lora("up_proj", self.layer), plan, step.backend)
        inner_RI = self.act_fn(gate_RI) * up_RI
        out_RD = grouped_mm(inner_RI, self.down_EDI.transpose(1, 2), offs=ends_E)
        out_RD = add_lora(out_RD, inner_RI, step.lora("down_proj", self.layer), plan, step.backend)

        # Un-sort is a gather over the fixed K, added in order of expert id: no atomics, no order to lose.
        back_R = torch.empty_like(order_R)
        back_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        out_TKD = out_RD[back_R].view(len(x_TD), self.top_k, -1)
        return (out_TKD * score_TK.unsqueeze(-1).to(out_TKD.dtype)).sum(1).unsqueeze(0)

    def _route(self, x_TD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        prob_TE = softmax(linear(x_TD, self.gate_ED), dim=-1, dtype=torch.float32)
        ids_TK = torch.topk(prob_TE, self.top_k, dim=-1).indices
        if step.rows.expert_ids_TLK is not None:
            replay_TK = step.rows.expert_ids_TLK[:, self.layer]
            ids_TK = torch.where((replay_TK >= 0).all(-1, keepdim=True), replay_TK, ids_TK)
        ids_TK = ids_TK.sort(dim=-1).values
        score_TK = prob_TE.gather(1, ids_TK)
        if self.normalise:
            score_TK = score_TK / score_TK.sum(-1, keepdim=True)
        if step.routing is not None:
            step.routing.append(ids_TK.to(torch.int16))
        return ids_TK, score_TK
