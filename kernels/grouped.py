"""The math of `reference.py` on `torch.bmm`. Segments are padded to one of eleven heights, and
those of one height share a `bmm`.

Short segments are copied together, and so are the rows that they add to; long ones, and rows that
lie right already, are used where they are. Either way a product adds in place, so what a segment
gets depends on its own shape alone.

Suffixes: G segments of a bucket, H those of an arena, U tile rows, D in, F out, R rank; B segments
of a batch, M its height.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from populace.kernels.batches import Batches, BucketBatches, SegmentBatch
from populace.kernels.plan import SegmentPlan
from populace.kernels.segments import Ints

if TYPE_CHECKING:
    from populace.kernels.lora import LoraWeights


def add_deltas(
    y_TF: Tensor, x_TD: Tensor, modules: Sequence[Sequence[LoraWeights]], plan: SegmentPlan
) -> list[Tensor]:
    """See `reference.add_deltas`; returns s · x Aᵀ, [U, R] by module and bucket."""
    batches = plan.batches
    x_UD, y_UF, shrunk = _to_tiles(x_TD, batches), _to_tiles(y_TF, batches), []
    for own_UF, weights in zip(y_UF.chunk(len(modules), 1), modules, strict=True):
        for bucket in batches.buckets:
            a_GRD, b_GFR = _gather(weights, bucket, x_TD.dtype)
            s_UR = x_TD.new_empty(bucket.rows.stop - bucket.rows.start, a_GRD.shape[1])
            for batch in bucket.batches:
                s_BMR = _own(s_UR, batch, bucket)
                torch.bmm(_tiles(x_UD, batch), a_GRD[batch.members].mT, out=s_BMR)
            s_UR *= _scales(weights, batches, bucket)
            for batch in bucket.batches:
                _tiles(own_UF, batch).baddbmm_(_own(s_UR, batch, bucket), b_GFR[batch.members].mT)
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
        for bucket in batches.buckets:
            s_UR = next(saved)
            a_GRD, b_GFR = _gather(weights, bucket, x_TD.dtype)
            ds_UR, da_GRD, db_GFR = (
                torch.empty_like(s_UR),
                torch.empty_like(a_GRD),
                torch.empty_like(b_GFR),
            )
            for batch in bucket.batches:
                torch.bmm(
                    _tiles(own_UF, batch), b_GFR[batch.members], out=_own(ds_UR, batch, bucket)
                )
            ds_UR *= _scales(weights, batches, bucket)
            for batch in bucket.batches:
                ds_BMR, s_BMR = _own(ds_UR, batch, bucket), _own(s_UR, batch, bucket)
                torch.bmm(_tiles(own_UF, batch).mT, s_BMR, out=db_GFR[batch.members])
                torch.bmm(ds_BMR.mT, _tiles(x_UD, batch), out=da_GRD[batch.members])
                _tiles(dx_UD, batch).baddbmm_(ds_BMR, a_GRD[batch.members])
            _put(weights, da_GRD, db_GFR, bucket, plan.accumulates)
    _from_tiles(dx_TD, dx_UD, batches)


def _to_tiles(x_TD: Tensor, batches: Batches) -> Tensor:
    return x_TD if batches.source_U is None else x_TD.index_select(0, batches.source_U)


def _from_tiles(y_TF: Tensor, y_UF: Tensor, batches: Batches) -> None:
    if batches.place_T is not None:
        torch.index_select(y_UF, 0, batches.place_T, out=y_TF)


def _tiles(x_UD: Tensor, batch: SegmentBatch) -> Tensor:
    return x_UD[batch.rows].view(batch.size, batch.height, -1)


def _own(s_UR: Tensor, batch: SegmentBatch, bucket: BucketBatches) -> Tensor:
    """The batch's part of a tensor over the bucket's tile rows alone."""
    start = batch.start - bucket.rows.start
    return s_UR[start : start + batch.size * batch.height].view(batch.size, batch.height, -1)


def _scales(weights: Sequence[LoraWeights], batches: Batches, bucket: BucketBatches) -> Tensor:
    # One tensor for all arenas of a bucket.
    scale_S = weights[bucket.shares[0].arena].scale_S
    scale_U = scale_S[batches.slot_U[bucket.rows]]
    return torch.where(batches.is_padding_U[bucket.rows], 0.0, scale_U).unsqueeze(1)


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """Rank as products take it: rows of 16 bytes, which they need, and which keeps rank 1 off the
    matrix-vector path whose bits depend on the number of rows."""
    multiple = 16 // dtype.itemsize
    return -(-rank // multiple) * multiple


def _gather(
    weights: Sequence[LoraWeights], bucket: BucketBatches, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A [G, R, D] and B [G, F, R] of the bucket's segments, ranks padded with zeros."""
    first = weights[bucket.shares[0].arena]
    rank = first.a.shape[-2]
    padded = padded_rank(rank, dtype)
    if len(bucket.shares) > 1:
        return _gather_mixed(weights, bucket, padded, dtype)
    a, b = first.a[bucket.shares[0].index], first.b[bucket.shares[0].index]
    if padded == rank:
        return a.to(dtype), b.to(dtype)
    a_GRD = a.new_zeros(len(a), padded, a.shape[2], dtype=dtype)
    b_GFR = b.new_zeros(len(b), b.shape[1], padded, dtype=dtype)
    a_GRD[:, :rank].copy_(a)
    b_GFR[:, :, :rank].copy_(b)
    return a_GRD, b_GFR


def _gather_mixed(
    weights: Sequence[LoraWeights], bucket: BucketBatches, padded: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`_gather` of several ranks: A's rows at once, from wherever they begin in the memory that the
    arenas share, with zeros from its last slot, which is nobody's; B's, which are short, arena by
    arena."""
    own = [weights[share.arena] for share in bucket.shares]
    which_G = np.searchsorted([share.arena for share in bucket.shares], bucket.arena_G)
    rank_G1 = np.array([w.a.shape[-2] for w in own])[which_G, None]
    a, b, r_R = own[0].a, own[0].b, np.arange(padded)
    start_G = np.array([w.a.storage_offset() for w in own])[which_G]
    start_G = start_G + bucket.slot_G * a.stride(0)
    if bucket.expert_G is not None:
        start_G += bucket.expert_G * np.array([w.a.stride(1) for w in own])[which_G]
    nobody = (len(a) - 1) * a.stride(0)
    row_GR = np.where(r_R < rank_G1, start_G[:, None] + r_R * a.shape[-1], nobody)
    a_GRD = _rows(a, row_GR, a.shape[-1]).to(dtype)
    b_GFR = b.new_zeros(len(rank_G1), b.shape[-2], padded, dtype=dtype)
    for w, share in zip(own, bucket.shares, strict=True):
        b_GFR[torch.from_numpy(share.place_H), :, : w.b.shape[-1]] = w.b[share.index].to(dtype)
    return a_GRD, b_GFR


def _rows(shared: Tensor, start_GN: Ints, width: int) -> Tensor:
    """[G, N, width]: runs of elements of the memory that `shared` is a view of."""
    size = shared.untyped_storage().nbytes() // shared.itemsize
    runs = shared.as_strided((size - width + 1, width), (1, 1), 0)
    taken = runs.index_select(0, torch.from_numpy(start_GN.reshape(-1)))
    return taken.view(*start_GN.shape, width)


def _put(
    weights: Sequence[LoraWeights],
    da_GRD: Tensor,
    db_GFR: Tensor,
    bucket: BucketBatches,
    accumulates: bool,
) -> None:
    """Each arena's gradients to where they are to be."""
    for share in bucket.shares:
        own = weights[share.arena]
        for grad, value_G in ((own.grad_a, da_GRD), (own.grad_b, db_GFR)):
            own_H = value_G
            if len(bucket.shares) > 1:
                own_H = value_G[torch.from_numpy(share.place_H)]
            exact_H = own_H[:, : grad.shape[-2], : grad.shape[-1]]
            if accumulates:
                grad[share.index] = grad[share.index] + exact_H
            else:
                grad[share.index] = exact_H.to(grad.dtype)
