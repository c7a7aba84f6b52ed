"""The truth: one segment at a time, in plain algebra. Slow and obvious."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from populace.kernels.tiles import ArenaSegments

if TYPE_CHECKING:
    from populace.kernels.lora import LoraWeights


def add_delta(y_TF: Tensor, x_TD: Tensor, weights: LoraWeights, segments: ArenaSegments) -> list[Tensor]:
    """y += s · (x Aᵀ) Bᵀ in place; returns x Aᵀ of every segment, which backward needs."""
    shrunk = []
    for rows, where, slot in _segments(segments):
        s_CR = x_TD[rows] @ weights.a[where].to(x_TD.dtype).T
        y_TF[rows] += weights.scale_S[slot] * (s_CR @ weights.b[where].to(x_TD.dtype).T)
        shrunk.append(s_CR)
    return shrunk


def add_gradients(
    dx_TD: Tensor,
    dy_TF: Tensor,
    x_TD: Tensor,
    shrunk: list[Tensor],
    weights: LoraWeights,
    segments: ArenaSegments,
    accumulates: bool,
) -> None:
    """dx += s · (dy B) A in place; dA and dB go into `weights.grad_a` and `grad_b`, added or replacing."""
    for (rows, where, slot), s_CR in zip(_segments(segments), shrunk, strict=True):
        scale = weights.scale_S[slot]
        ds_CR = (scale * (dy_TF[rows] @ weights.b[where].to(x_TD.dtype))).to(x_TD.dtype)
        db_FR = scale * (dy_TF[rows].T @ s_CR).to(weights.grad_b.dtype)
        da_RD = (ds_CR.T @ x_TD[rows]).to(weights.grad_a.dtype)
        weights.grad_a[where] = da_RD + weights.grad_a[where] if accumulates else da_RD
        weights.grad_b[where] = db_FR + weights.grad_b[where] if accumulates else db_FR
        dx_TD[rows] += ds_CR @ weights.a[where].to(x_TD.dtype)


def _segments(segments: ArenaSegments) -> Iterator[tuple[slice, tuple[int, ...], int]]:
    """(rows, index of the adapter's tensor, slot) of each."""
    for index, (start, count) in enumerate(zip(segments.start_G.tolist(), segments.count_G.tolist(), strict=True)):
        slot = int(segments.slot_G[index])
        where = (slot,) if segments.expert_G is None else (slot, int(segments.expert_G[index]))
        yield slice(start, start + count), where, slot
