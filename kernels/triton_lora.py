"""The same in Triton: three kernels, one launch per arena and tile height, whatever the number of adapters.

    reduce    S = s · X Aᵀ   and   dS = s · dY B        tall input, narrow output
    spread    Y += S Bᵀ      and   dX += dS A           narrow input, added into what is there
    outer     dB = dYᵀ S     and   dA = dSᵀ X           one program per segment and block, rows in their order

No atomics, no split of a reduction over programs, no autotuning: configurations are fixed by operation, rank and dtype,
and a tile's height follows from its own segment's length, so a segment's bits are its own. Weights stay fp32 in the
slab and are rounded to the rows' dtype on the way in; sums are fp32.

Suffixes: T rows, I tiles, G segments, U an arena's rows side by side, D in, F out, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from populace.kernels.tiles import Ints, SegmentPlan, tiles_by_height

if TYPE_CHECKING:
    from populace.kernels.lora import LoraWeights

SHORT, TALL = 16, 64
"""Heights of tiles: segments of at most 16 rows, as decoding has them, don't pay for 64."""
CHUNK = 32
"""Rows that an outer product adds at a time."""


@dataclass(frozen=True, slots=True)
class Config:
    """How one kernel is compiled. `block` runs along the wide side of its tensors."""

    block: int
    block_r: int
    """Along the rank."""
    num_warps: int
    num_stages: int


def config_of(kernel: str, height: int, block_r: int, dtype: torch.dtype) -> Config:
    """Fixed for ever: another configuration may add in another order."""
    is_half = dtype.itemsize == 2
    # fp32 has no tensor cores to feed; more warps and short steps along the rank keep its operands in registers.
    num_warps = 8 if not is_half and (height == TALL or block_r > 32) else 4
    match kernel:
        case "reduce":
            block = (64 if is_half else 32) // (2 if block_r > 64 else 1)
            return Config(block=block, block_r=block_r, num_warps=num_warps, num_stages=3 if is_half else 2)
        case "spread":
            wide, along = (64, min(block_r, 64)) if is_half else (32, 16)
            return Config(block=wide, block_r=along, num_warps=num_warps, num_stages=1)
        case _:
            return Config(
                block=64 if is_half else 32, block_r=block_r, num_warps=num_warps, num_stages=2 if is_half else 1
            )


def block_of_rank(rank: int) -> int:
    """Ranks are computed as 16, 32, 64 or 128: `tl.dot` takes no fewer than 16."""
    return max(16, 1 << (rank - 1).bit_length())


@triton.jit  # type: ignore[untyped-decorator]
def reduce_kernel(  # type: ignore[no-untyped-def]
    x, w, out, row_I, own_I, count_I, weight_I, scale_I,
    x_stride, w_stride_r, w_stride_k, num_k, rank,
    HEIGHT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[own + i, r] = scale · Σ_k x[row + i, k] · w[weight + r, k]."""
    tile = tl.program_id(0)
    count = tl.load(count_I + tile)
    i = tl.arange(0, HEIGHT)
    r = tl.arange(0, BLOCK_R)
    x_rows = x + (tl.load(row_I + tile) + i)[:, None] * x_stride
    w_rows = w + tl.load(weight_I + tile) + r[None, :] * w_stride_r
    in_rows, in_rank = (i < count)[:, None], (r < rank)[None, :]
    total = tl.zeros((HEIGHT, BLOCK_R), tl.float32)
    for start in range(0, num_k, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x_ik = tl.load(x_rows + k[None, :], mask=in_rows & (k < num_k)[None, :], other=0.0)
        w_kr = tl.load(w_rows + k[:, None] * w_stride_k, mask=in_rank & (k < num_k)[:, None], other=0.0)
        total = tl.dot(x_ik, w_kr.to(x_ik.dtype), total, input_precision="ieee")
    total = total * tl.load(scale_I + tile)
    places = out + (tl.load(own_I + tile) + i)[:, None] * rank + r[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=in_rows & in_rank)


@triton.jit  # type: ignore[untyped-decorator]
def spread_kernel(  # type: ignore[no-untyped-def]
    s, w, y, row_I, own_I, count_I, weight_I,
    y_stride, w_stride_r, w_stride_k, num_k, rank,
    HEIGHT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[row + i, k] += Σ_r s[own + i, r] · w[weight + r, k]."""
    tile = tl.program_id(0)
    count = tl.load(count_I + tile)
    i = tl.arange(0, HEIGHT)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_rows, in_k = (i < count)[:, None], (k < num_k)[None, :]
    s_rows = s + (tl.load(own_I + tile) + i)[:, None] * rank
    w_columns = w + tl.load(weight_I + tile) + k[None, :] * w_stride_k
    places = y + (tl.load(row_I + tile) + i)[:, None] * y_stride + k[None, :]
    total = tl.load(places, mask=in_rows & in_k, other=0.0).to(tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        s_ir = tl.load(s_rows + r[None, :], mask=in_rows & (r < rank)[None, :], other=0.0)
        w_rk = tl.load(w_columns + r[:, None] * w_stride_r, mask=(r < rank)[:, None] & in_k, other=0.0)
        total = tl.dot(s_ir, w_rk.to(s_ir.dtype), total, input_precision="ieee")
    tl.store(places, total.to(y.dtype.element_ty), mask=in_rows & in_k)


@triton.jit  # type: ignore[untyped-decorator]
def outer_kernel(  # type: ignore[no-untyped-def]
    p, s, out, row_G, own_G, count_G, weight_G,
    p_stride, out_stride_r, out_stride_k, num_k, rank,
    ACCUMULATES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[weight + (k, r)] = Σ_t p[row + t, k] · s[own + t, r], chunk after chunk of rows, or that much more."""
    segment = tl.program_id(0)
    count = tl.load(count_G + segment)
    row, own = tl.load(row_G + segment), tl.load(own_G + segment)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK, BLOCK_R), tl.float32)
    for start in range(0, count, CHUNK):
        t = start + tl.arange(0, CHUNK)
        p_places = p + (row + t)[:, None] * p_stride + k[None, :]
        p_tk = tl.load(p_places, mask=(t < count)[:, None] & (k < num_k)[None, :], other=0.0)
        s_places = s + (own + t)[:, None] * rank + r[None, :]
        s_tr = tl.load(s_places, mask=(t < count)[:, None] & (r < rank)[None, :], other=0.0)
        total = tl.dot(tl.trans(p_tk), s_tr, total, input_precision="ieee")
    places = out + tl.load(weight_G + segment) + k[:, None] * out_stride_k + r[None, :] * out_stride_r
    inside = (k < num_k)[:, None] & (r < rank)[None, :]
    if ACCUMULATES:
        total += tl.load(places, mask=inside, other=0.0)
    tl.store(places, total, mask=inside)


def add_deltas(y_TF: Tensor, x_TD: Tensor, modules: Sequence[Sequence[LoraWeights]], plan: SegmentPlan) -> list[Tensor]:
    """See `reference.add_deltas`; returns s · x Aᵀ, [U, R] by module and arena."""
    shrunk = []
    for own_TF, weights in zip(y_TF.chunk(len(modules), 1), modules, strict=True):
        for part in _parts(plan):
            w = weights[part.arena]
            s_UR = _reduce(x_TD, w.a, w.scale_S, part)
            _spread(s_UR, w.b.mT, own_TF, part)
            shrunk.append(s_UR)
    return shrunk


def add_gradients(
    dx_TD: Tensor,
    dy_TF: Tensor,
    x_TD: Tensor,
    shrunk: Sequence[Tensor],
    modules: Sequence[Sequence[LoraWeights]],
    plan: SegmentPlan,
) -> None:
    """See `reference.add_gradients`; `shrunk` comes scaled."""
    saved = iter(shrunk)
    for own_TF, weights in zip(dy_TF.chunk(len(modules), 1), modules, strict=True):
        for part in _parts(plan):
            w = weights[part.arena]
            ds_UR = _reduce(own_TF, w.b.mT, w.scale_S, part)
            _outer(own_TF, next(saved), w.grad_b.mT, plan.accumulates, part)
            _outer(x_TD, ds_UR, w.grad_a, plan.accumulates, part)
            _spread(ds_UR, w.a, dx_TD, part)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One arena's segments."""

    arena: int
    start_G: Ints
    own_G: Ints
    """Where each segment's rows begin when the arena's rows are put side by side."""
    count_G: Ints
    slot_G: Ints
    expert_G: Ints | None

    def places(self, w: Tensor) -> Ints:
        """Offset of each segment's tensor in a slab's view."""
        offset_G = self.slot_G * w.stride(0)
        return offset_G if self.expert_G is None else offset_G + self.expert_G * w.stride(1)


def _parts(plan: SegmentPlan) -> Iterator[_Part]:
    segments = plan.segments
    for arena in np.unique(segments.arena_G).tolist():
        mine = segments.arena_G == arena
        count_G = segments.count_G[mine]
        yield _Part(
            arena=arena,
            start_G=segments.start_G[mine],
            own_G=np.cumsum(count_G) - count_G,
            count_G=count_G,
            slot_G=segments.slot_G[mine],
            expert_G=None if segments.expert_G is None else segments.expert_G[mine],
        )


def _reduce(x: Tensor, w: Tensor, scale_S: Tensor, part: _Part) -> Tensor:
    """`w` and its like below: [slots, (experts,) R, K]."""
    rank, num_k = w.shape[-2:]
    out_UR = torch.empty(int(part.count_G.sum()), rank, dtype=x.dtype, device=x.device)
    for height, segment_I, offset_I in tiles_by_height(part.count_G, (SHORT, TALL)):
        config = config_of("reduce", height, block_of_rank(rank), x.dtype)
        scale_I = scale_S[_tensor(part.slot_G[segment_I], x.device)].float()
        reduce_kernel[(len(segment_I),)](
            x, w, out_UR, *_tile_columns(part, segment_I, offset_I, height, w, x.device), scale_I,
            x.stride(0), w.stride(-2), w.stride(-1), num_k, rank,
            HEIGHT=height, BLOCK=config.block, BLOCK_R=config.block_r,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out_UR


def _spread(s_UR: Tensor, w: Tensor, y: Tensor, part: _Part) -> None:
    rank, num_k = w.shape[-2:]
    for height, segment_I, offset_I in tiles_by_height(part.count_G, (SHORT, TALL)):
        config = config_of("spread", height, block_of_rank(rank), y.dtype)
        spread_kernel[(len(segment_I), triton.cdiv(num_k, config.block))](
            s_UR, w, y, *_tile_columns(part, segment_I, offset_I, height, w, y.device),
            y.stride(0), w.stride(-2), w.stride(-1), num_k, rank,
            HEIGHT=height, BLOCK=config.block, BLOCK_R=config.block_r,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def _outer(p: Tensor, s_UR: Tensor, out: Tensor, accumulates: bool, part: _Part) -> None:
    rank, num_k = out.shape[-2:]
    config = config_of("outer", SHORT, block_of_rank(rank), p.dtype)
    columns = (part.start_G, part.own_G, part.count_G, part.places(out))
    outer_kernel[(len(part.count_G), triton.cdiv(num_k, config.block))](
        p, s_UR, out, *(_tensor(column, p.device) for column in columns),
        p.stride(0), out.stride(-2), out.stride(-1), num_k, rank,
        ACCUMULATES=accumulates, CHUNK=CHUNK, BLOCK=config.block, BLOCK_R=config.block_r,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _tile_columns(
    part: _Part, segment_I: Ints, offset_I: Ints, height: int, w: Tensor, device: torch.device
) -> list[Any]:
    columns = (
        part.start_G[segment_I] + offset_I,
        part.own_G[segment_I] + offset_I,
        np.minimum(part.count_G[segment_I] - offset_I, height),
        part.places(w)[segment_I],
    )
    return [_tensor(column, device) for column in columns]


def _tensor(column: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(column).to(device)
