"""The MoE block: route, send rows to the owners of their experts, sort them by (expert, slot), one
grouped base product with LoRA inside, and all the way back.

Routing can be replayed (R3, https://arxiv.org/abs/2510.11370): the selection comes from the
rollout, the scores are computed anew by the family's own gate, so gradients still flow through
them.

Suffixes: T rows, E experts (of this shard, where tensors are meant), K experts per token, N copies
sent (T·K), M copies received, R routed rows (M and some filling), S shards, D hidden, I
intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from populace.kernels.lora import FrozenProduct, lora_product
from populace.kernels.plan import SegmentPlan, order_by_expert, plan_segments
from populace.workers.base.forward import Step, StepHolder
from populace.workers.base.gates import Gate
from populace.workers.shards.exchange import Exchange
from populace.workers.shards.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A shard's own experts of one layer."""

    gate_up_EOD: Tensor
    """Gate, then up: O = 2I."""
    down_EDI: Tensor
    act_fn: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Copies of rows in another order, and the way back."""

    row_R: Tensor
    """The row that each one is a copy of; filling copies row 0, and nobody reads what becomes of
    it."""
    place_TK: Tensor
    """Where the k-th copy of each row lies."""

    @staticmethod
    def of(order_R: Tensor, num_rows: int, top_k: int) -> Copies:
        """`order_R`: which of the T·K (row, k) pairs lies at each place; -1 is filling."""
        is_filling_R = order_R < 0
        place_N = torch.empty(num_rows * top_k, dtype=torch.int64)
        place_N[order_R[~is_filling_R]] = (~is_filling_R).nonzero().squeeze(1)
        return Copies(row_R=order_R.clamp(min=0) // top_k, place_TK=place_N.view(num_rows, top_k))


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """Where one layer's rows lie among this shard's experts. Planned once, used by gate, up and
    down, forward and backward."""

    copies: Copies
    ends_E: Tensor
    plan: SegmentPlan

    @staticmethod
    def of(
        expert_N: Tensor, arena_N: Tensor, slot_N: Tensor, top_k: int, num_experts: int, step: Step
    ) -> Routes:
        """Of `top_k` (row, k) pairs per row, each with its expert, counted from this shard's
        first."""
        order_R, ends_E = order_by_expert(expert_N, num_experts, step.kernels.row_multiple)
        pair_R = order_R.clamp(min=0)
        arena_R = torch.where(order_R < 0, -1, arena_N[pair_R])
        return Routes(
            copies=Copies.of(order_R, len(expert_N) // top_k, top_k),
            ends_E=ends_E,
            plan=plan_segments(
                arena_R, slot_N[pair_R], expert_N[pair_R], accumulates=step.plan.accumulates
            ),
        )


class MoeBlock(nn.Module):
    """Takes the place of a family's sparse MoE block and uses its tensors."""

    def __init__(
        self,
        experts: Experts,
        gate: Gate,
        shared: nn.Module | None,
        *,
        layer: int,
        moe_layer: int,
        placement: Placement,
        rank: int,
        exchange: Exchange,
        holder: StepHolder,
    ) -> None:
        """`shared`: experts that every row goes through, without LoRA. `moe_layer`: `layer` counted
        among those with experts."""
        super().__init__()
        self.experts, self.gate, self.shared_experts = experts, gate, shared
        self.layer, self.moe_layer, self.exchange, self.holder = layer, moe_layer, exchange, holder
        self.own, self.num_shards = placement.shards[rank].experts, len(placement.shards)
        self.owner_E = torch.tensor(placement.owners)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, D]."""
        step = self.holder.step
        x_TD = hidden_states[0]
        ids_TK, score_TK = self._route(x_TD, step)
        if self.num_shards == 1:
            top_k = ids_TK.shape[1]
            arena_N, slot_N = (
                rows_T.repeat_interleave(top_k) for rows_T in (step.rows.arena_T, step.rows.slot_T)
            )
            routes = Routes.of(ids_TK.reshape(-1), arena_N, slot_N, top_k, len(self.own), step)
            out_RD = self._through_experts(_dispatch(x_TD, routes.copies), routes, step)
            out_TD = _combine(out_RD, score_TK, routes.copies)
        else:
            out_TD = self._on_all_shards(x_TD, ids_TK, score_TK, step)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD.unsqueeze(0)

    def _on_all_shards(self, x_TD: Tensor, ids_TK: Tensor, score_TK: Tensor, step: Step) -> Tensor:
        """The same, each copy of a row with its slot on the shard that owns its expert."""
        num_rows, top_k = ids_TK.shape
        owner_N = self.owner_E[ids_TK.reshape(-1)]
        order_N = torch.argsort(owner_N, stable=True)
        sent = Copies.of(order_N, num_rows, top_k)
        send_S = torch.bincount(owner_N, minlength=self.num_shards).tolist()
        receive_S = self.exchange.counts(send_S)
        columns = (
            ids_TK.reshape(-1)[order_N],
            step.rows.arena_T[sent.row_R],
            step.rows.slot_T[sent.row_R],
        )
        label_M3 = self.exchange.rows(torch.stack(columns, 1), send_S, receive_S)
        expert_M, arena_M, slot_M = (column_M.contiguous() for column_M in label_M3.unbind(1))
        x_MD = _send(_dispatch(x_TD, sent), self.exchange, send_S, receive_S)
        routes = Routes.of(expert_M - self.own.start, arena_M, slot_M, 1, len(self.own), step)
        out_RD = self._through_experts(_dispatch(x_MD, routes.copies), routes, step)
        out_ND = _send(_collect(out_RD, routes.copies), self.exchange, receive_S, send_S)
        return _combine(out_ND, score_TK, sent)

    def _through_experts(self, x_RD: Tensor, routes: Routes, step: Step) -> Tensor:
        own = self.experts
        gate_RI, up_RI = self._product(
            x_RD, own.gate_up_EOD, ("gate_proj", "up_proj"), routes, step
        ).chunk(2, 1)
        return self._product(
            own.act_fn(gate_RI) * up_RI, own.down_EDI, ("down_proj",), routes, step
        )

    def _product(
        self, x_RD: Tensor, w_EFD: Tensor, modules: tuple[str, ...], routes: Routes, step: Step
    ) -> Tensor:
        weights = [step.lora(module, self.layer) for module in modules]
        base = FrozenProduct(w=w_EFD, ends_E=routes.ends_E)
        return lora_product(x_RD, base, weights, routes.plan, step.kernels.backend)

    def _route(self, x_TD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        affinity_TE = self.gate.affinity(x_TD)
        ids_TK = self.gate.select(affinity_TE).sort(dim=-1).values
        if step.rows.expert_ids_TLK is not None:
            recorded_TK = step.rows.expert_ids_TLK[:, self.moe_layer].sort(dim=-1).values
            is_recorded_T1 = (recorded_TK >= 0).all(-1, keepdim=True)
            step.count_out_of_route(is_recorded_T1.squeeze(1), (recorded_TK != ids_TK).any(-1))
            ids_TK = torch.where(is_recorded_T1, recorded_TK, ids_TK)
        if step.routing is not None:
            step.routing.append(ids_TK.to(torch.int16))
        return ids_TK, self.gate.weigh(affinity_TE.gather(1, ids_TK))


def _dispatch(x_TD: Tensor, copies: Copies) -> Tensor:
    x_RD: Tensor = _Dispatch.apply(x_TD, copies)  # type: ignore[no-untyped-call]
    return x_RD


def _combine(out_RD: Tensor, score_TK: Tensor, copies: Copies) -> Tensor:
    out_TD: Tensor = _Combine.apply(out_RD, score_TK.to(out_RD.dtype), copies)  # type: ignore[no-untyped-call]
    return out_TD


def _collect(out_RD: Tensor, copies: Copies) -> Tensor:
    out_MD: Tensor = _Collect.apply(out_RD, copies)  # type: ignore[no-untyped-call]
    return out_MD


def _send(x_ND: Tensor, exchange: Exchange, send_S: list[int], receive_S: list[int]) -> Tensor:
    x_MD: Tensor = _Send.apply(x_ND, exchange, send_S, receive_S)  # type: ignore[no-untyped-call]
    return x_MD


class _Send(torch.autograd.Function):
    """[N, D] here -> [M, D] there. Backward sends gradients the other way."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, exchange: Exchange, send_S: list[int], receive_S: list[int]
    ) -> Tensor:
        ctx.exchange, ctx.send_S, ctx.receive_S = exchange, send_S, receive_S
        return exchange.rows(x_ND, send_S, receive_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.rows(grads[0], ctx.receive_S, ctx.send_S), None, None, None


class _Collect(torch.autograd.Function):
    """[R, D] -> [M, D]: the one copy of each row; filling is left behind and gets no gradient."""

    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, copies: Copies) -> Tensor:
        ctx.place_M, ctx.num_routed = copies.place_TK.squeeze(1), len(out_RD)
        return out_RD.index_select(0, ctx.place_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dout_RD = grads[0].new_zeros(ctx.num_routed, grads[0].shape[1])
        return dout_RD.index_copy_(0, ctx.place_M, grads[0]), None


class _Dispatch(torch.autograd.Function):
    """[T, D] -> [R, D]: a copy of each row for each of its experts. Backward adds a row's K
    gradients in order of expert id: a gather, no atomics, no order to lose."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return x_TD.index_select(0, copies.row_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_T, *others = ctx.copies.place_TK.unbind(1)
        dx_TD = grads[0].index_select(0, first_T)
        for place_T in others:
            dx_TD += grads[0].index_select(0, place_T)
        return dx_TD, None


class _Combine(torch.autograd.Function):
    """([R, D], [T, K]) -> [T, D]: the sum of a row's expert outputs, weighted by its scores, in
    order of expert id."""

    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, score_TK: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(out_RD, score_TK)
        ctx.copies = copies
        sum_TD: Tensor | None = None
        for place_T, score_T in zip(copies.place_TK.unbind(1), score_TK.unbind(1), strict=True):
            part_TD = out_RD.index_select(0, place_T).mul_(score_T.unsqueeze(1))
            sum_TD = part_TD if sum_TD is None else sum_TD.add_(part_TD)
        assert sum_TD is not None
        return sum_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out_RD, score_TK = ctx.saved_tensors
        dy_TD, copies = grads[0], ctx.copies
        score_R = score_TK.new_zeros(len(out_RD))
        score_R[copies.place_TK.reshape(-1)] = score_TK.reshape(-1)
        dout_RD = dy_TD.index_select(0, copies.row_R).mul_(score_R.unsqueeze(1))
        dscore = [
            out_RD.index_select(0, place_T).mul_(dy_TD).sum(1)
            for place_T in copies.place_TK.unbind(1)
        ]
        return dout_RD, torch.stack(dscore, 1), None
