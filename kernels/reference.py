"""The truth: one segment at a time, in plain algebra. Slow and obvious."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from populace.kernels.plan import SegmentPlan

if TYPE_CHECKING:
    from populace.kernels.lora import LoraWeights


def add_deltas(
    y_TF: Tensor, x_TD: Tensor, modules: Sequence[Sequence[LoraWeights]], plan: SegmentPlan
) -> list[Tensor]:
    """y += s · (x Aᵀ) Bᵀ in place, each module on its share of the columns; returns what backward
    needs. `plan` has segments; the columns of a row of x or y lie side by side in memory."""
    shrunk = []
    for own_TF, weights in zip(y_TF.chunk(len(modules), 1), modules, strict=True):
        for rows, arena, where in _segments(plan):
            own = weights[arena]
            s_CR = x_TD[rows] @ own.a[where].to(x_TD.dtype).T
            own_TF[rows] += own.scale_S[where[0]] * (s_CR @ own.b[where].to(x_TD.dtype).T)
            shrunk.append(s_CR)
    return shrunk


def add_gradients(
    dx_TD: Tensor,
    dy_TF: Tensor,
    x_TD: Tensor,
    shrunk: Sequence[Tensor],
    modules: Sequence[Sequence[LoraWeights]],
    plan: SegmentPlan,
) -> None:
    """dx += s · (dy B) A in place, each module from its share of the columns; dA and dB go into
    `grad_a` and `grad_b`, added to what is there or in its place, as the plan says."""
    saved = iter(shrunk)
    for own_TF, weights in zip(dy_TF.chunk(len(modules), 1), modules, strict=True):
        for rows, arena, where in _segments(plan):
            own = weights[arena]
            scale = own.scale_S[where[0]]
            ds_CR = (scale * (own_TF[rows] @ own.b[where].to(x_TD.dtype))).to(x_TD.dtype)
            db_FR = scale * (own_TF[rows].T @ next(saved)).to(own.grad_b.dtype)
            da_RD = (ds_CR.T @ x_TD[rows]).to(own.grad_a.dtype)
            own.grad_a[where] = da_RD + own.grad_a[where] if plan.accumulates else da_RD
            own.grad_b[where] = db_FR + own.grad_b[where] if plan.accumulates else db_FR
            dx_TD[rows] += ds_CR @ own.a[where].to(x_TD.dtype)


def _segments(plan: SegmentPlan) -> Iterator[tuple[slice, int, tuple[int, ...]]]:
    """(rows, arena, index of the adapter's tensor in it) of each."""
    segments = plan.segments
    index = [segments.slot_G] if segments.expert_G is None else [segments.slot_G, segments.expert_G]
    wheres = zip(*(column.tolist() for column in index), strict=True)
    starts, counts, arenas = (
        segments.start_G.tolist(),
        segments.count_G.tolist(),
        segments.arena_G.tolist(),
    )
    for start, count, arena, where in zip(starts, counts, arenas, wheres, strict=True):
        yield slice(start, start + count), arena, where
