"""The MoE block: route, send rows to the owners of their experts, sort them by (expert, slot), one
grouped base product with LoRA inside, and all the way back.

Routing can be replayed (R3, https://arxiv.org/abs/2510.11370): the selection comes from the
rollout, the scores are computed anew by the family's own gate, so gradients still flow through
them.

Suffixes: T rows, E experts (of this shard, where tensors are meant), K experts per token, N copies
sent (T·K), M copies received, R routed rows (M and some padding), S shards, D hidden, I
intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from populace.kernels.lora import FrozenProduct, Plan, lora_product
from populace.kernels.plan import order_by_expert
from populace.kernels.route import plan_routes
from populace.workers.base.forward import ForwardPass, PassHolder, plan_on_cpu
from populace.workers.base.gates import Gate
from populace.workers.device import Device
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

    row_Y: Tensor
    """The row that each one is a copy of; padding copies row 0, and nobody reads what becomes of
    it."""
    place_TK: Tensor
    """Where the k-th copy of each row lies."""

    @staticmethod
    def of(order_Y: Tensor, num_rows: int, top_k: int) -> Copies:
        """`order_Y`: which of the T·K (row, k) pairs lies at each place; -1 is padding."""
        num_pairs = num_rows * top_k
        number_Y = torch.arange(len(order_Y), device=order_Y.device)
        # Padding writes behind the pairs.
        place_Q = order_Y.new_empty(num_pairs + 1)
        place_Q.scatter_(0, torch.where(order_Y < 0, num_pairs, order_Y), number_Y)
        return Copies(
            row_Y=order_Y.clamp(min=0) // top_k, place_TK=place_Q[:-1].view(num_rows, top_k)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """Where one layer's rows lie among this shard's experts. Planned once, used by gate, up and
    down, forward and backward."""

    copies: Copies
    ends_E: Tensor
    plan: Plan
    tile_I4: Tensor | None = None
    """See `FrozenProduct`."""

    @staticmethod
    def of(
        expert_TK: Tensor,
        arena_T: Tensor,
        slot_T: Tensor,
        num_experts: int,
        forward_pass: ForwardPass,
    ) -> Routes:
        """Routes of rows, each with its experts, counted from this shard's first."""
        slab, kernels = forward_pass.slab, forward_pass.kernels
        accumulates = forward_pass.plan.accumulates
        if kernels.device.is_cuda:
            plan = plan_routes(
                slot_T,
                expert_TK,
                num_experts,
                1 if slab is None else slab.capacity,
                is_empty=slab is None,
                accumulates=accumulates,
            )
            tile_I4 = None if kernels.device.has_grouped_product else plan.experts_I4
            copies = Copies(row_Y=plan.row_R, place_TK=plan.place_TK)
            return Routes(copies=copies, ends_E=plan.ends_E, plan=plan, tile_I4=tile_I4)
        num_rows, top_k = expert_TK.shape
        expert_Q, arena_Q, slot_Q = (
            expert_TK.reshape(-1),
            arena_T.repeat_interleave(top_k),
            slot_T.repeat_interleave(top_k),
        )
        order_Y, ends_E = order_by_expert(expert_Q, num_experts, kernels.row_multiple)
        pair_Y = order_Y.clamp(min=0)
        arena_Y = torch.where(order_Y < 0, -1, arena_Q[pair_Y])
        return Routes(
            copies=Copies.of(order_Y, num_rows, top_k),
            ends_E=ends_E,
            plan=plan_on_cpu(
                slab, arena_Y, slot_Q[pair_Y], expert_Q[pair_Y], accumulates=accumulates
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
        holder: PassHolder,
        device: Device,
    ) -> None:
        """`shared`: experts that every row goes through, without LoRA. `moe_layer`: `layer` counted
        among those with experts."""
        super().__init__()
        self.experts, self.gate, self.shared_experts = experts, gate, shared
        self.layer, self.moe_layer, self.exchange, self.holder = layer, moe_layer, exchange, holder
        self.own, self.num_shards = placement.shards[rank].experts, len(placement.shards)
        self.owner_E = device.place(torch.tensor(placement.owners))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, D]."""
        forward_pass = self.holder.current
        x_TD = hidden_states[0]
        ids_TK, score_TK = self._route(x_TD, forward_pass)
        if self.num_shards == 1:
            rows = forward_pass.rows
            routes = Routes.of(ids_TK, rows.arena_T, rows.slot_T, len(self.own), forward_pass)
            out_YD = self._through_experts(_dispatch(x_TD, routes.copies), routes, forward_pass)
            out_TD = _combine(out_YD, score_TK, routes.copies)
        else:
            out_TD = self._on_all_shards(x_TD, ids_TK, score_TK, forward_pass)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD.unsqueeze(0)

    def _on_all_shards(
        self, x_TD: Tensor, ids_TK: Tensor, score_TK: Tensor, forward_pass: ForwardPass
    ) -> Tensor:
        """`forward` over shards: each copy of a row, with its slot, goes to its expert's owner."""
        num_rows, top_k = ids_TK.shape
        owner_Q = self.owner_E[ids_TK.reshape(-1)]
        order_Q = torch.argsort(owner_Q, stable=True)
        sent = Copies.of(order_Q, num_rows, top_k)
        shard_J = torch.arange(self.num_shards, device=owner_Q.device)
        # The host has to know how much is sent: one wait a layer.
        send_J = (owner_Q.unsqueeze(1) == shard_J).sum(0).tolist()
        receive_J = self.exchange.counts(send_J)
        columns = (
            ids_TK.reshape(-1)[order_Q],
            forward_pass.rows.arena_T[sent.row_Y],
            forward_pass.rows.slot_T[sent.row_Y],
        )
        label_Z3 = self.exchange.all_to_all(torch.stack(columns, 1), send_J, receive_J)
        expert_Z, arena_Z, slot_Z = (column_Z.contiguous() for column_Z in label_Z3.unbind(1))
        x_ZD = _send(_dispatch(x_TD, sent), self.exchange, send_J, receive_J)
        expert_Z1 = (expert_Z - self.own.start).unsqueeze(1)
        routes = Routes.of(expert_Z1, arena_Z, slot_Z, len(self.own), forward_pass)
        out_YD = self._through_experts(_dispatch(x_ZD, routes.copies), routes, forward_pass)
        out_QD = _send(_collect(out_YD, routes.copies), self.exchange, receive_J, send_J)
        return _combine(out_QD, score_TK, sent)

    def _through_experts(self, x_YD: Tensor, routes: Routes, forward_pass: ForwardPass) -> Tensor:
        own = self.experts
        gate_YI, up_YI = self._product(
            x_YD, own.gate_up_EOD, ("gate_proj", "up_proj"), routes, forward_pass
        ).chunk(2, 1)
        return self._product(
            own.act_fn(gate_YI) * up_YI, own.down_EDI, ("down_proj",), routes, forward_pass
        )

    def _product(
        self,
        x_YD: Tensor,
        w_EFD: Tensor,
        modules: tuple[str, ...],
        routes: Routes,
        forward_pass: ForwardPass,
    ) -> Tensor:
        base = FrozenProduct(w=w_EFD, ends_E=routes.ends_E, tile_I4=routes.tile_I4)
        return lora_product(
            x_YD,
            base,
            forward_pass.lora(modules, self.layer),
            routes.plan,
            forward_pass.kernels.backend,
        )

    def _route(self, x_TD: Tensor, forward_pass: ForwardPass) -> tuple[Tensor, Tensor]:
        affinity_TE = self.gate.affinity(x_TD)
        ids_TK = self.gate.select(affinity_TE).sort(dim=-1).values
        if forward_pass.rows.expert_ids_TLK is not None:
            recorded_TK = forward_pass.rows.expert_ids_TLK[:, self.moe_layer].sort(dim=-1).values
            is_recorded_T1 = (recorded_TK >= 0).all(-1, keepdim=True)
            forward_pass.count_out_of_route(
                is_recorded_T1.squeeze(1), (recorded_TK != ids_TK).any(-1)
            )
            ids_TK = torch.where(is_recorded_T1, recorded_TK, ids_TK)
        if forward_pass.routing is not None:
            forward_pass.routing.append(ids_TK.to(torch.int16))
        return ids_TK, self.gate.weigh(affinity_TE.gather(1, ids_TK))


def _dispatch(x_TD: Tensor, copies: Copies) -> Tensor:
    x_YD: Tensor = _Dispatch.apply(x_TD, copies)  # type: ignore[no-untyped-call]
    return x_YD


def _combine(out_YD: Tensor, score_TK: Tensor, copies: Copies) -> Tensor:
    out_TD: Tensor = _Combine.apply(out_YD, score_TK.to(out_YD.dtype), copies)  # type: ignore[no-untyped-call]
    return out_TD


def _collect(out_YD: Tensor, copies: Copies) -> Tensor:
    out_ZD: Tensor = _Collect.apply(out_YD, copies)  # type: ignore[no-untyped-call]
    return out_ZD


def _send(x_QD: Tensor, exchange: Exchange, send_J: list[int], receive_J: list[int]) -> Tensor:
    x_ZD: Tensor = _Send.apply(x_QD, exchange, send_J, receive_J)  # type: ignore[no-untyped-call]
    return x_ZD


class _Send(torch.autograd.Function):
    """[Q, D] here -> [Z, D] there. Backward sends gradients the other way."""

    @staticmethod
    def forward(
        ctx: Any, x_QD: Tensor, exchange: Exchange, send_J: list[int], receive_J: list[int]
    ) -> Tensor:
        ctx.exchange, ctx.send_J, ctx.receive_J = exchange, send_J, receive_J
        return exchange.all_to_all(x_QD, send_J, receive_J)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.all_to_all(grads[0], ctx.receive_J, ctx.send_J), None, None, None


class _Collect(torch.autograd.Function):
    """[Y, D] -> [Z, D]: the one copy of each row; padding is left behind and gets no gradient."""

    @staticmethod
    def forward(ctx: Any, out_YD: Tensor, copies: Copies) -> Tensor:
        ctx.place_Z, ctx.num_routed = copies.place_TK.squeeze(1), len(out_YD)
        return out_YD.index_select(0, ctx.place_Z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dout_YD = grads[0].new_zeros(ctx.num_routed, grads[0].shape[1])
        return dout_YD.index_copy_(0, ctx.place_Z, grads[0]), None


class _Dispatch(torch.autograd.Function):
    """[T, D] -> [Y, D]: a copy of each row for each of its experts. Backward adds a row's K
    gradients in order of expert id: a gather, no atomics, no order to lose."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return x_TD.index_select(0, copies.row_Y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_T, *others = ctx.copies.place_TK.unbind(1)
        dx_TD = grads[0].index_select(0, first_T)
        for place_T in others:
            dx_TD += grads[0].index_select(0, place_T)
        return dx_TD, None


class _Combine(torch.autograd.Function):
    """([Y, D], [T, K]) -> [T, D]: the sum of a row's expert outputs, weighted by its scores, in
    order of expert id."""

    @staticmethod
    def forward(ctx: Any, out_YD: Tensor, score_TK: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(out_YD, score_TK)
        ctx.copies = copies
        sum_TD: Tensor | None = None
        for place_T, score_T in zip(copies.place_TK.unbind(1), score_TK.unbind(1), strict=True):
            part_TD = out_YD.index_select(0, place_T).mul_(score_T.unsqueeze(1))
            sum_TD = part_TD if sum_TD is None else sum_TD.add_(part_TD)
        assert sum_TD is not None
        return sum_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out_YD, score_TK = ctx.saved_tensors
        dy_TD, copies = grads[0], ctx.copies
        score_Y = score_TK.new_zeros(len(out_YD))
        score_Y[copies.place_TK.reshape(-1)] = score_TK.reshape(-1)
        dout_YD = dy_TD.index_select(0, copies.row_Y).mul_(score_Y.unsqueeze(1))
        dscore = [
            out_YD.index_select(0, place_T).mul_(dy_TD).sum(1)
            for place_T in copies.place_TK.unbind(1)
        ]
        return dout_YD, torch.stack(dscore, 1), None
