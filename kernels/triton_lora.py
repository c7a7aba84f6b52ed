"""The math of `reference.py` in Triton: three kernels, one launch per arena and tile height,
whatever the number of adapters.

    reduce    S = s · X Aᵀ   and   dS = s · dY B        tall input, narrow output
    spread    Y += S Bᵀ      and   dX += dS A           narrow input, added into what is there
    outer     dB = dYᵀ S     and   dA = dSᵀ X           one program per segment and block

In `outer` a program takes its rows in their order. No atomics, no split of a reduction over
programs, no autotuning: configurations are fixed by operation, tile height, rank and dtype, and a
tile's height follows from its own segment's length, so a segment's bits are its own. Weights stay
fp32 in the slab and are rounded to the rows' dtype on the way in; sums are fp32.
docs/measurements/kernels.md has them on a GPU.

Suffixes: T rows, I tiles and G segments (of 5 columns: see `ArenaTiles`), S slots, U an arena's
rows side by side, D in, F out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from populace.kernels.plan import SegmentPlan
from populace.kernels.tiles import SHORT, TALL, ArenaTiles

if TYPE_CHECKING:
    from populace.kernels.lora import LoraWeights

CHUNK = 32
"""Rows that an outer product adds at a time."""
MAX_RANK = 128


@dataclass(frozen=True, slots=True)
class Config:
    """How one kernel is compiled. `block` runs along the wide side of its tensors."""

    block: int
    block_r: int
    """Along the rank."""
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """For Triton's compiler. Fusion of multiplications with additions is named because its
        default changes."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def config_of(kernel: str, height: int, block_r: int, dtype: torch.dtype) -> Config:
    """Fixed for ever: another configuration may add in another order."""
    is_half = dtype.itemsize == 2
    # fp32 has no tensor cores to feed; more warps and short steps along the rank keep its operands
    # in registers.
    num_warps = 8 if not is_half and (height == TALL or block_r > 32) else 4
    match kernel:
        case "reduce" if is_half:
            block = 128 if block_r <= 32 else 64 if block_r == 64 else 32
            num_warps = 2 if height == SHORT and block_r <= 32 else 4
            stages = 3 if block_r <= 64 else 2
            return Config(block=block, block_r=block_r, num_warps=num_warps, num_stages=stages)
        case "reduce":
            return Config(
                block=16 if block_r > 64 else 32, block_r=block_r, num_warps=num_warps, num_stages=2
            )
        case "spread":
            if not is_half:
                return Config(block=32, block_r=16, num_warps=num_warps, num_stages=1)
            block = 128 if height == SHORT or block_r == 16 else 64
            return Config(block=block, block_r=min(block_r, 64), num_warps=num_warps, num_stages=1)
        case _:
            block = 32 if not is_half else 128 if block_r <= 64 else 64
            return Config(block=block, block_r=block_r, num_warps=num_warps, num_stages=1)


def block_of_rank(rank: int) -> int:
    """Ranks are computed as 16, 32, 64 or 128: `tl.dot` takes no fewer than 16, and more don't fit
    into registers."""
    if rank > MAX_RANK:
        raise ValueError(
            f"rank is {rank}; these kernels take at most {MAX_RANK}, `grouped` takes any"
        )
    return max(16, 1 << (rank - 1).bit_length())


@triton.jit
def _tile(tiles, w_stride_s, w_stride_e):  # type: ignore[no-untyped-def]
    """(row, own, count, slot) of this program's tile, see `ArenaTiles`, and where the slot's (and
    the expert's) tensor lies."""
    place = tiles + tl.program_id(0) * 5
    slot = tl.load(place + 3)
    weight = slot * w_stride_s + tl.load(place + 4) * w_stride_e
    return tl.load(place), tl.load(place + 1), tl.load(place + 2), slot, weight


@triton.jit  # type: ignore[untyped-decorator]
def reduce_kernel(  # type: ignore[no-untyped-def]
    x, w, out, tiles, scale_S,
    x_stride, w_stride_s, w_stride_e, w_stride_r, w_stride_k, num_k, rank,
    HEIGHT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[own + i, r] = scale[slot] · Σ_k x[row + i, k] · w[weight + r, k]."""
    row, own, count, slot, weight = _tile(tiles, w_stride_s, w_stride_e)
    i = tl.arange(0, HEIGHT)
    r = tl.arange(0, BLOCK_R)
    x_rows = x + (row + i)[:, None] * x_stride
    w_rows = w + weight + r[None, :] * w_stride_r
    in_rows, in_rank = (i < count)[:, None], (r < rank)[None, :]
    total = tl.zeros((HEIGHT, BLOCK_R), tl.float32)
    for start in range(0, num_k, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x_ik = tl.load(x_rows + k[None, :], mask=in_rows & (k < num_k)[None, :], other=0.0)
        w_kr = tl.load(
            w_rows + k[:, None] * w_stride_k, mask=in_rank & (k < num_k)[:, None], other=0.0
        )
        total = tl.dot(x_ik, w_kr.to(x_ik.dtype), total, input_precision="ieee")
    total = total * tl.load(scale_S + slot)
    places = out + (own + i)[:, None] * rank + r[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=in_rows & in_rank)


@triton.jit  # type: ignore[untyped-decorator]
def spread_kernel(  # type: ignore[no-untyped-def]
    s, w, y, tiles,
    y_stride, w_stride_s, w_stride_e, w_stride_r, w_stride_k, num_k, rank,
    HEIGHT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[row + i, k] += Σ_r s[own + i, r] · w[weight + r, k]."""
    row, own, count, _, weight = _tile(tiles, w_stride_s, w_stride_e)
    i = tl.arange(0, HEIGHT)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_rows, in_k = (i < count)[:, None], (k < num_k)[None, :]
    s_rows = s + (own + i)[:, None] * rank
    w_columns = w + weight + k[None, :] * w_stride_k
    places = y + (row + i)[:, None] * y_stride + k[None, :]
    total = tl.load(places, mask=in_rows & in_k, other=0.0).to(tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        s_ir = tl.load(s_rows + r[None, :], mask=in_rows & (r < rank)[None, :], other=0.0)
        w_rk = tl.load(
            w_columns + r[:, None] * w_stride_r, mask=(r < rank)[:, None] & in_k, other=0.0
        )
        total = tl.dot(s_ir, w_rk.to(s_ir.dtype), total, input_precision="ieee")
    tl.store(places, total.to(y.dtype.element_ty), mask=in_rows & in_k)


@triton.jit  # type: ignore[untyped-decorator]
def outer_kernel(  # type: ignore[no-untyped-def]
    p, s, out, tiles,
    p_stride, out_stride_s, out_stride_e, out_stride_r, out_stride_k, num_k, rank,
    ACCUMULATES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[weight + (k, r)] = Σ_t p[row + t, k] · s[own + t, r], chunk after chunk of rows, or that
    much more. A tile is a whole segment."""
    row, own, count, _, weight = _tile(tiles, out_stride_s, out_stride_e)
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
    places = out + weight + k[:, None] * out_stride_k + r[None, :] * out_stride_r
    inside = (k < num_k)[:, None] & (r < rank)[None, :]
    if ACCUMULATES:
        total += tl.load(places, mask=inside, other=0.0)
    tl.store(places, total, mask=inside)


def add_deltas(
    y_TF: Tensor, x_TD: Tensor, modules: Sequence[Sequence[LoraWeights]], plan: SegmentPlan
) -> list[Tensor]:
    """See `reference.add_deltas`; returns s · x Aᵀ, [U, R] by module and arena."""
    shrunk = []
    for own_TF, weights in zip(y_TF.chunk(len(modules), 1), modules, strict=True):
        for tiles in plan.tiles:
            w = weights[tiles.arena]
            s_UR = _reduce(x_TD, w.a, w.scale_S, tiles)
            _spread(s_UR, w.b.mT, own_TF, tiles)
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
        for tiles in plan.tiles:
            w = weights[tiles.arena]
            ds_UR = _reduce(own_TF, w.b.mT, w.scale_S, tiles)
            _outer(own_TF, next(saved), w.grad_b.mT, plan.accumulates, tiles)
            _outer(x_TD, ds_UR, w.grad_a, plan.accumulates, tiles)
            _spread(ds_UR, w.a, dx_TD, tiles)


def _reduce(x: Tensor, w: Tensor, scale_S: Tensor, tiles: ArenaTiles) -> Tensor:
    """`w` and its like below: [slots, (experts,) R, K]."""
    rank, num_k = w.shape[-2:]
    out_UR = torch.empty(tiles.num_rows, rank, dtype=x.dtype, device=x.device)
    for height, tile_I5 in tiles.by_height:
        config = config_of("reduce", height, block_of_rank(rank), x.dtype)
        reduce_kernel[(len(tile_I5),)](
            x, w, out_UR, tile_I5, scale_S, x.stride(0), *_strides(w), num_k, rank,
            HEIGHT=height, BLOCK=config.block, BLOCK_R=config.block_r, **config.options,
        )  # fmt: skip
    return out_UR


def _spread(s_UR: Tensor, w: Tensor, y: Tensor, tiles: ArenaTiles) -> None:
    rank, num_k = w.shape[-2:]
    for height, tile_I5 in tiles.by_height:
        config = config_of("spread", height, block_of_rank(rank), y.dtype)
        spread_kernel[(len(tile_I5), triton.cdiv(num_k, config.block))](
            s_UR, w, y, tile_I5, y.stride(0), *_strides(w), num_k, rank,
            HEIGHT=height, BLOCK=config.block, BLOCK_R=config.block_r, **config.options,
        )  # fmt: skip


def _outer(p: Tensor, s_UR: Tensor, out: Tensor, accumulates: bool, tiles: ArenaTiles) -> None:
    rank, num_k = out.shape[-2:]
    config = config_of("outer", TALL, block_of_rank(rank), p.dtype)
    outer_kernel[(len(tiles.whole_G5), triton.cdiv(num_k, config.block))](
        p, s_UR, out, tiles.whole_G5, p.stride(0), *_strides(out), num_k, rank,
        ACCUMULATES=accumulates, CHUNK=CHUNK, BLOCK=config.block, BLOCK_R=config.block_r,
        **config.options,
    )  # fmt: skip


def _strides(w: Tensor) -> tuple[int, int, int, int]:
    """Strides of slot, expert (0 where there is none), rank and the wide side."""
    return w.stride(0), w.stride(1) if w.ndim == 4 else 0, w.stride(-2), w.stride(-1)
