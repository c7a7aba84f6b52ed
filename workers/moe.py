"""The MoE block: route, sort rows by (expert, slot), one grouped base product with LoRA inside, un-sort.

Routing can be replayed (R3, https://arxiv.org/abs/2510.11370): the selection comes from the rollout, the scores
are computed anew by the family's own gate, so gradients still flow through them.

Suffixes: T rows, E experts, K experts per token, R routed rows (T·K and some filling), D hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softmax

from populace.kernels.lora import FrozenProduct, lora_product
from populace.kernels.tiles import SegmentPlan, order_by_expert, plan_segments
from populace.workers.step import Step, StepHolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """Where one layer's rows go. Planned once, used by gate, up and down, forward and backward."""

    row_R: Tensor
    """The row that each routed row is a copy of; filling copies row 0, and nobody reads what becomes of it."""
    place_TK: Tensor
    """Where the copy of each row for its k-th expert lies."""
    ends_E: Tensor
    plan: SegmentPlan

    @staticmethod
    def of(ids_TK: Tensor, num_experts: int, step: Step) -> Routes:
        num_rows, top_k = ids_TK.shape
        expert_N = ids_TK.reshape(-1)
        arena_N = step.rows.arena_T.repeat_interleave(top_k)
        slot_N = step.rows.slot_T.repeat_interleave(top_k)
        order_R, ends_E = order_by_expert(expert_N, num_experts, step.kernels.row_multiple)
        is_filling_R = order_R < 0
        order_R = order_R.clamp(min=0)
        place_N = torch.empty_like(expert_N)
        place_N[order_R[~is_filling_R]] = (~is_filling_R).nonzero().squeeze(1)
        arena_R = torch.where(is_filling_R, -1, arena_N[order_R])
        return Routes(
            row_R=order_R // top_k,
            place_TK=place_N.view(num_rows, top_k),
            ends_E=ends_E,
            plan=plan_segments(arena_R, slot_N[order_R], expert_N[order_R], accumulates=step.plan.accumulates),
        )


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
        routes = Routes.of(ids_TK, self.num_experts, step)
        x_RD: Tensor = _Dispatch.apply(x_TD, routes)  # type: ignore[no-untyped-call]
        gate_RI, up_RI = self._product(x_RD, self.gate_up_EOD, ("gate_proj", "up_proj"), routes, step).chunk(2, 1)
        out_RD = self._product(self.act_fn(gate_RI) * up_RI, self.down_EDI, ("down_proj",), routes, step)
        out_TD: Tensor = _Combine.apply(out_RD, score_TK.to(out_RD.dtype), routes)  # type: ignore[no-untyped-call]
        return out_TD.unsqueeze(0)

    def _product(self, x_RD: Tensor, w_EFD: Tensor, modules: tuple[str, ...], routes: Routes, step: Step) -> Tensor:
        weights = [step.lora(module, self.layer) for module in modules]
        base = FrozenProduct(w=w_EFD, ends_E=routes.ends_E)
        return lora_product(x_RD, base, weights, routes.plan, step.kernels.backend)

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


class _Dispatch(torch.autograd.Function):
    """[T, D] -> [R, D]: a copy of each row for each of its experts. Backward adds a row's K gradients in order of
    expert id: a gather, no atomics, no order to lose."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return x_TD.index_select(0, routes.row_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_T, *others = ctx.routes.place_TK.unbind(1)
        dx_TD = grads[0].index_select(0, first_T)
        for place_T in others:
            dx_TD += grads[0].index_select(0, place_T)
        return dx_TD, None


class _Combine(torch.autograd.Function):
    """([R, D], [T, K]) -> [T, D]: the sum of a row's expert outputs, weighted by its scores, in order of expert id."""

    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, score_TK: Tensor, routes: Routes) -> Tensor:
        ctx.save_for_backward(out_RD, score_TK)
        ctx.routes = routes
        sum_TD: Tensor | None = None
        for place_T, score_T in zip(routes.place_TK.unbind(1), score_TK.unbind(1), strict=True):
            part_TD = out_RD.index_select(0, place_T).mul_(score_T.unsqueeze(1))
            sum_TD = part_TD if sum_TD is None else sum_TD.add_(part_TD)
        assert sum_TD is not None
        return sum_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out_RD, score_TK = ctx.saved_tensors
        dy_TD, routes = grads[0], ctx.routes
        score_R = score_TK.new_zeros(len(out_RD))
        score_R[routes.place_TK.reshape(-1)] = score_TK.reshape(-1)
        dout_RD = dy_TD.index_select(0, routes.row_R).mul_(score_R.unsqueeze(1))
        dscore = [out_RD.index_select(0, place_T).mul_(dy_TD).sum(1) for place_T in routes.place_TK.unbind(1)]
        return dout_RD, torch.stack(dscore, 1), None
