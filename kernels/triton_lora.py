"""The math of `reference.py` in Triton: three kernels, one launch per tile height and class of
ranks, whatever the number of adapters.

    reduce    S = s · X Aᵀ   and   dS = s · dY B        tall input, narrow output
    spread    Y += S Bᵀ      and   dX += dS A           narrow input, added into what is there
    outer     dB = dYᵀ S     and   dA = dSᵀ X           one program per segment and block

In `outer` a program takes its rows in their order. No atomics, no split of a reduction over
programs, no autotuning: configurations are fixed by operation, tile height, class of ranks and
dtype, and a tile's height follows from its own segment's length, so a segment's bits are its own.
Weights stay fp32 where their slots have them, at their exact ranks, and are rounded to the rows'
dtype on the way in; sums are fp32. docs/measurements/kernels.md has them on a GPU.

Suffixes: T rows, I tiles and G segments (of 4 columns: see `RoutePlan`), S slots, W the widest rank
of a pass, D in, F out, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from populace.kernels.pointers import LoraPointers
from populace.kernels.route import SHORT, TALL, RoutePlan

CHUNK = 32
"""Rows that an outer product adds at a time."""
WIDEST = 128
"""Along the rank, of one program; a larger rank takes several."""


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
            if height == SHORT and block_r == WIDEST:
                block = 16
            stages = 3 if block_r <= 64 else 2
            return Config(block=block, block_r=block_r, num_warps=num_warps, num_stages=stages)
        case "reduce":
            return Config(
                block=16 if block_r > 32 else 32, block_r=block_r, num_warps=num_warps, num_stages=2
            )
        case "spread":
            if not is_half:
                block = 16 if height == TALL else 32
                return Config(block=block, block_r=16, num_warps=num_warps, num_stages=1)
            block = 128 if height == SHORT or block_r == 16 else 64
            return Config(block=block, block_r=min(block_r, 64), num_warps=num_warps, num_stages=1)
        case _:
            block = 32 if not is_half else 128 if block_r <= 32 else 64
            num_warps = 8 if block_r == WIDEST else num_warps
            return Config(block=block, block_r=block_r, num_warps=num_warps, num_stages=1)


def block_of_rank(rank: int) -> int:
    """Ranks are computed as 16, 32, 64 or 128 at a time: `tl.dot` takes no fewer than 16, and more
    don't fit into registers."""
    return min(WIDEST, max(16, 1 << (rank - 1).bit_length()))


@triton.jit
def _tensor(addresses_S, rank_S, slot, expert, offset, expert_step):  # type: ignore[no-untyped-def]
    """(rank, pointer) of a slot's A; its B lies right behind. Places in a layout grow with the
    rank, so one number says where any slot has a module."""
    rank = tl.load(rank_S + slot)
    flat = tl.load(addresses_S + slot).to(tl.pointer_type(tl.float32))
    # What is inside of one tensor is counted in 32 bits: pointers to blocks of it are registers.
    return rank.to(tl.int32), flat + rank * (offset + expert.to(tl.int64) * expert_step)


@triton.jit  # type: ignore[untyped-decorator]
def reduce_kernel(  # type: ignore[no-untyped-def]
    x, addresses_S, rank_S, scale_S, out, tiles,
    x_stride, out_stride, num_k, inner, offset, expert_step, above, most,
    IS_B: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[row + i, r] = scale[slot] · Σ_k x[row + i, k] · w[r, k], for the tiles of slots with a
    rank above `above` and at most `most`; w is A, or the transpose of B."""
    tile = tiles + tl.program_id(0) * 4
    count = tl.load(tile + 1)
    if count > 0:
        row, slot = tl.load(tile).to(tl.int64), tl.load(tile + 2)
        rank, w = _tensor(addresses_S, rank_S, slot, tl.load(tile + 3), offset, expert_step)
        first = tl.program_id(1) * BLOCK_R
        if (rank > above) & (rank <= most) & (first < rank):
            i = tl.arange(0, HEIGHT)
            r = first + tl.arange(0, BLOCK_R)
            x_rows = x + row * x_stride + i[:, None] * x_stride
            in_rows, in_rank = (i < count)[:, None], (r < rank)[None, :]
            total = tl.zeros((HEIGHT, BLOCK_R), tl.float32)
            for start in range(0, num_k, BLOCK):
                k = start + tl.arange(0, BLOCK)
                x_ik = tl.load(x_rows + k[None, :], mask=in_rows & (k < num_k)[None, :], other=0.0)
                if IS_B:
                    w_places = w + rank * inner + k[:, None] * rank + r[None, :]
                else:
                    w_places = w + r[None, :] * num_k + k[:, None]
                w_kr = tl.load(w_places, mask=in_rank & (k < num_k)[:, None], other=0.0)
                total = tl.dot(x_ik, w_kr.to(x_ik.dtype), total, input_precision="ieee")
            total = total * tl.load(scale_S + slot)
            places = out + row * out_stride + i[:, None] * out_stride + r[None, :]
            tl.store(places, total.to(out.dtype.element_ty), mask=in_rows & in_rank)


@triton.jit  # type: ignore[untyped-decorator]
def spread_kernel(  # type: ignore[no-untyped-def]
    s, addresses_S, rank_S, y, tiles,
    s_stride, y_stride, num_k, inner, offset, expert_step, above, most,
    IS_B: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[row + i, k] += Σ_r s[row + i, r] · w[r, k]; tiles and w as in `reduce_kernel`."""
    tile = tiles + tl.program_id(0) * 4
    count = tl.load(tile + 1)
    if count > 0:
        row, slot = tl.load(tile).to(tl.int64), tl.load(tile + 2)
        rank, w = _tensor(addresses_S, rank_S, slot, tl.load(tile + 3), offset, expert_step)
        if (rank > above) & (rank <= most):
            i = tl.arange(0, HEIGHT)
            k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            in_rows, in_k = (i < count)[:, None], (k < num_k)[None, :]
            s_rows = s + row * s_stride + i[:, None] * s_stride
            places = y + row * y_stride + i[:, None] * y_stride + k[None, :]
            total = tl.load(places, mask=in_rows & in_k, other=0.0).to(tl.float32)
            for start in range(0, rank, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                s_ir = tl.load(s_rows + r[None, :], mask=in_rows & (r < rank)[None, :], other=0.0)
                if IS_B:
                    w_places = w + rank * inner + k[None, :] * rank + r[:, None]
                else:
                    w_places = w + r[:, None] * num_k + k[None, :]
                w_rk = tl.load(w_places, mask=(r < rank)[:, None] & in_k, other=0.0)
                total = tl.dot(s_ir, w_rk.to(s_ir.dtype), total, input_precision="ieee")
            tl.store(places, total.to(y.dtype.element_ty), mask=in_rows & in_k)


@triton.jit  # type: ignore[untyped-decorator]
def outer_kernel(  # type: ignore[no-untyped-def]
    p, s, addresses_S, rank_S, tiles,
    p_stride, s_stride, num_k, inner, offset, expert_step, above, most,
    IS_B: tl.constexpr, ACCUMULATES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """w[r, k] = Σ_t p[row + t, k] · s[row + t, r], chunk after chunk of rows, or that much more; w
    as in `reduce_kernel`, among the gradients. A tile is a whole segment."""
    tile = tiles + tl.program_id(0) * 4
    count = tl.load(tile + 1)
    if count > 0:
        row, slot = tl.load(tile).to(tl.int64), tl.load(tile + 2)
        rank, w = _tensor(addresses_S, rank_S, slot, tl.load(tile + 3), offset, expert_step)
        first = tl.program_id(2) * BLOCK_R
        if (rank > above) & (rank <= most) & (first < rank):
            k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            r = first + tl.arange(0, BLOCK_R)
            total = tl.zeros((BLOCK, BLOCK_R), tl.float32)
            for start in range(0, count, CHUNK):
                t = start + tl.arange(0, CHUNK)
                p_places = p + row * p_stride + t[:, None] * p_stride + k[None, :]
                p_tk = tl.load(
                    p_places, mask=(t < count)[:, None] & (k < num_k)[None, :], other=0.0
                )
                s_places = s + row * s_stride + t[:, None] * s_stride + r[None, :]
                s_tr = tl.load(s_places, mask=(t < count)[:, None] & (r < rank)[None, :], other=0.0)
                total = tl.dot(tl.trans(p_tk), s_tr, total, input_precision="ieee")
            if IS_B:
                places = w + rank * inner + k[:, None] * rank + r[None, :]
            else:
                places = w + r[None, :] * num_k + k[:, None]
            inside = (k < num_k)[:, None] & (r < rank)[None, :]
            if ACCUMULATES:
                total += tl.load(places, mask=inside, other=0.0)
            tl.store(places, total, mask=inside)


def add_deltas(
    y_TF: Tensor, x_TD: Tensor, modules: Sequence[LoraPointers], plan: RoutePlan
) -> list[Tensor]:
    """See `reference.add_deltas`; returns s · x Aᵀ, [T, W] by module, undefined beyond a row's
    rank."""
    shrunk = []
    for own_TF, module in zip(y_TF.chunk(len(modules), 1), modules, strict=True):
        s_TW = _reduce(x_TD, module, plan, is_b=False)
        _spread(s_TW, module, own_TF, plan, is_b=True)
        shrunk.append(s_TW)
    return shrunk


def add_gradients(
    dx_TD: Tensor,
    dy_TF: Tensor,
    x_TD: Tensor,
    shrunk: Sequence[Tensor],
    modules: Sequence[LoraPointers],
    plan: RoutePlan,
) -> None:
    """See `reference.add_gradients`; `shrunk` comes scaled."""
    saved = iter(shrunk)
    for own_TF, module in zip(dy_TF.chunk(len(modules), 1), modules, strict=True):
        ds_TW = _reduce(own_TF, module, plan, is_b=True)
        _outer(own_TF, next(saved), module, plan, is_b=True)
        _outer(x_TD, ds_TW, module, plan, is_b=False)
        _spread(ds_TW, module, dx_TD, plan, is_b=False)


def _reduce(x_TK: Tensor, module: LoraPointers, plan: RoutePlan, *, is_b: bool) -> Tensor:
    out_TW = x_TK.new_empty(len(x_TK), module.widest)
    for height, tile_I4 in plan.by_height:
        for ranks in _classes(module.ranks):
            config = config_of("reduce", height, ranks.block, x_TK.dtype)
            reduce_kernel[(len(tile_I4), triton.cdiv(ranks.widest, ranks.block))](
                x_TK, module.weights_S, module.rank_S, module.scale_S, out_TW, tile_I4,
                x_TK.stride(0), out_TW.stride(0), x_TK.shape[1], *module.places, ranks.above,
                ranks.widest,
                IS_B=is_b, HEIGHT=height, BLOCK=config.block, BLOCK_R=config.block_r,
                **config.options,
            )  # fmt: skip
    return out_TW


def _spread(
    s_TW: Tensor, module: LoraPointers, y_TK: Tensor, plan: RoutePlan, *, is_b: bool
) -> None:
    for height, tile_I4 in plan.by_height:
        for ranks in _classes(module.ranks):
            config = config_of("spread", height, ranks.block, y_TK.dtype)
            num_k = y_TK.shape[1]
            spread_kernel[(len(tile_I4), triton.cdiv(num_k, config.block))](
                s_TW, module.weights_S, module.rank_S, y_TK, tile_I4,
                s_TW.stride(0), y_TK.stride(0), num_k, *module.places, ranks.above, ranks.widest,
                IS_B=is_b, HEIGHT=height, BLOCK=config.block, BLOCK_R=config.block_r,
                **config.options,
            )  # fmt: skip


def _outer(
    p_TK: Tensor, s_TW: Tensor, module: LoraPointers, plan: RoutePlan, *, is_b: bool
) -> None:
    for ranks in _classes(module.ranks):
        config = config_of("outer", TALL, ranks.block, p_TK.dtype)
        num_k, num_blocks = p_TK.shape[1], triton.cdiv(ranks.widest, ranks.block)
        outer_kernel[(len(plan.whole_G4), triton.cdiv(num_k, config.block), num_blocks)](
            p_TK, s_TW, module.grads_S, module.rank_S, plan.whole_G4,
            p_TK.stride(0), s_TW.stride(0), num_k, *module.places, ranks.above, ranks.widest,
            IS_B=is_b, ACCUMULATES=plan.accumulates, CHUNK=CHUNK, BLOCK=config.block,
            BLOCK_R=config.block_r,
            **config.options,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _RankClass:
    """Ranks that one build of a kernel computes."""

    above: int
    widest: int
    block: int


@functools.lru_cache(maxsize=64)
def _classes(ranks: tuple[int, ...]) -> tuple[_RankClass, ...]:
    """One per block size that one of these ranks asks for."""
    found = []
    for block in sorted({block_of_rank(rank) for rank in ranks}):
        # Below the widest block a class goes up to its block, so that few builds serve all ranks.
        widest = max(ranks) if block == WIDEST else block
        above = 0 if block == 16 else block // 2
        found.append(_RankClass(above=above, widest=widest, block=block))
    return tuple(found)
