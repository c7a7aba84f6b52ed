"""The math of `reference.py` on `torch.bmm`. Segments are padded to one of eleven heights, and
those of one height share a `bmm`.

Short segments are copied together, and so are the rows that they add to; long ones, and rows that
lie right already, are used where they are. Either way a product adds in place, so what a segment
gets depends on its own shape alone.

Suffixes: G segments of an arena, U tile rows, D in, F out, R rank; B segments of a batch, M its
height.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from populace.kernels.batches import ArenaBatches, Batches, SegmentBatch
from populace.kernels.plan import SegmentPlan

if TYPE_CHECKING:
    from populace.kernels.lora import LoraWeights


def add_deltas(
    y_TF: Tensor, x_TD: Tensor, modules: Sequence[Sequence[LoraWeights]], plan: SegmentPlan
) -> list[Tensor]:
    """See `reference.add_deltas`; returns s · x Aᵀ, [U, R] by module and arena."""
    batches = plan.batches
    x_UD, y_UF, shrunk = _to_tiles(x_TD, batches), _to_tiles(y_TF, batches), []
    for own_UF, weights in zip(y_UF.chunk(len(modules), 1), modules, strict=True):
        for arena in batches.arenas:
            own = weights[arena.arena]
            a_GRD, b_GFR = _gather(own, arena, x_TD.dtype)
            s_UR = x_TD.new_empty(arena.rows.stop - arena.rows.start, a_GRD.shape[1])
            for batch in arena.batches:
                s_BMR = _own(s_UR, batch, arena)
                torch.bmm(_tiles(x_UD, batch), a_GRD[batch.members].mT, out=s_BMR)
            s_UR *= _scales(own, batches, arena)
            for batch in arena.batches:
                _tiles(own_UF, batch).baddbmm_(_own(s_UR, batch, arena), b_GFR[batch.members].mT)
            shrunk.append(s_UR)
    _from_tiles(y_TF, y_UF, batches)
    return shrunk


def add_gradients(
    dx_TD: Tensor,
    dy_TF: Tensor,
    x_TD: Tensor,
    shrunk: Sequence[Tensor],
    modules: Sequence[Sequence[LoraWeights]],
    plan: SegmentPlan,
) -> None:
    """See `reference.add_gradients`; `shrunk` comes scaled, with zeros where rows are padding."""
    batches, saved = plan.batches, iter(shrunk)
    x_UD, dy_UF, dx_UD = (_to_tiles(rows, batches) for rows in (x_TD, dy_TF, dx_TD))
    for own_UF, weights in zip(dy_UF.chunk(len(modules), 1), modules, strict=True):
        for arena in batches.arenas:
            own, s_UR = weights[arena.arena], next(saved)
            a_GRD, b_GFR = _gather(own, arena, x_TD.dtype)
            ds_UR, da_GRD, db_GFR = (
                torch.empty_like(s_UR),
                torch.empty_like(a_GRD),
                torch.empty_like(b_GFR),
            )
            for batch in arena.batches:
                torch.bmm(
                    _tiles(own_UF, batch), b_GFR[batch.members], out=_own(ds_UR, batch, arena)
                )
            ds_UR *= _scales(own, batches, arena)
            for batch in arena.batches:
                ds_BMR, s_BMR = _own(ds_UR, batch, arena), _own(s_UR, batch, arena)
                torch.bmm(_tiles(own_UF, batch).mT, s_BMR, out=db_GFR[batch.members])
                torch.bmm(ds_BMR.mT, _tiles(x_UD, batch), out=da_GRD[batch.members])
                _tiles(dx_UD, batch).baddbmm_(ds_BMR, a_GRD[batch.members])
            _put(own.grad_a, da_GRD, arena, plan.accumulates)
            _put(own.grad_b, db_GFR, arena, plan.accumulates)
    _from_tiles(dx_TD, dx_UD, batches)


def _to_tiles(x_TD: Tensor, batches: Batches) -> Tensor:
    return x_TD if batches.source_U is None else x_TD.index_select(0, batches.source_U)


def _from_tiles(y_TF: Tensor, y_UF: Tensor, batches: Batches) -> None:
    if batches.place_T is not None:
        torch.index_select(y_UF, 0, batches.place_T, out=y_TF)


def _tiles(x_UD: Tensor, batch: SegmentBatch) -> Tensor:
    return x_UD[batch.rows].view(batch.size, batch.height, -1)


def _own(s_UR: Tensor, batch: SegmentBatch, arena: ArenaBatches) -> Tensor:
    """The batch's part of a tensor over the arena's tile rows alone."""
    start = batch.start - arena.rows.start
    return s_UR[start : start + batch.size * batch.height].view(batch.size, batch.height, -1)


def _scales(weights: LoraWeights, batches: Batches, arena: ArenaBatches) -> Tensor:
    scale_U = weights.scale_S[batches.slot_U[arena.rows]]
    return torch.where(batches.is_padding_U[arena.rows], 0.0, scale_U).unsqueeze(1)


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """Rank as products take it: rows of 16 bytes, which they need, and which keeps rank 1 off the
    matrix-vector path whose bits depend on the number of rows."""
    multiple = 16 // dtype.itemsize
    return -(-rank // multiple) * multiple


def _gather(weights: LoraWeights, arena: ArenaBatches, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [G, R, D] and B [G, F, R] of the arena's segments, ranks padded with zeros."""
    rank = weights.a.shape[-2]
    padded = padded_rank(rank, dtype)
    a, b = weights.a[arena.index], weights.b[arena.index]
    if padded == rank:
        return a.to(dtype), b.to(dtype)
    a_GRD = a.new_zeros(len(a), padded, a.shape[2], dtype=dtype)
    b_GFR = b.new_zeros(len(b), b.shape[1], padded, dtype=dtype)
    a_GRD[:, :rank].copy_(a)
    b_GFR[:, :, :rank].copy_(b)
    return a_GRD, b_GFR


def _put(grad: Tensor, value_G: Tensor, arena: ArenaBatches, accumulates: bool) -> None:
    exact_G = value_G[:, : grad.shape[-2], : grad.shape[-1]]
    grad[arena.index] = grad[arena.index] + exact_G if accumulates else exact_G.to(grad.dtype)
