"""The same on torch's batched products: neighbouring segments of one length are one `bmm`, in place on strided views,
so that no row is copied and none is padded. What a segment gets depends on its own shape alone.

Suffixes: G segments of a run, C rows of each, D in, F out, R rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from populace.kernels.tiles import ArenaSegments, Run

if TYPE_CHECKING:
    from populace.kernels.lora import LoraWeights

SMALL_ROWS = 16
"""A product of fewer rows than this is never left alone in its batch: MKL then splits it over threads another way."""


def add_delta(y_TF: Tensor, x_TD: Tensor, weights: LoraWeights, segments: ArenaSegments) -> list[Tensor]:
    """See `reference.add_delta`; one tensor per run."""
    shrunk = []
    for run in segments.runs:
        s_GCR = _product(_rows(x_TD, run), _adapters(weights.a, run, x_TD.dtype).transpose(1, 2))
        scaled_GCR = _scaled(s_GCR, weights, run)
        _add_product(_rows(y_TF, run), scaled_GCR, _adapters(weights.b, run, x_TD.dtype).transpose(1, 2))
        shrunk.append(scaled_GCR)
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
    """See `reference.add_gradients`; `shrunk` comes scaled."""
    for run, scaled_GCR in zip(segments.runs, shrunk, strict=True):
        dy_GCF, x_GCD = _rows(dy_TF, run), _rows(x_TD, run)
        ds_GCR = _scaled(_product(dy_GCF, _adapters(weights.b, run, x_TD.dtype)), weights, run)
        _put(weights.grad_b, run, dy_GCF.transpose(1, 2), scaled_GCR, accumulates)
        _put(weights.grad_a, run, ds_GCR.transpose(1, 2), x_GCD, accumulates)
        _add_product(_rows(dx_TD, run), ds_GCR, _adapters(weights.a, run, x_TD.dtype))


def _rows(x_TD: Tensor, run: Run) -> Tensor:
    return x_TD[run.start : run.end].unflatten(0, (len(run.slots), run.num_rows))


def _adapters(w: Tensor, run: Run, dtype: torch.dtype) -> Tensor:
    """[G, ·, ·] of the run's segments; a view where their slots are neighbours."""
    return _select(w if run.expert is None else w[:, run.expert], run).to(dtype)


def _select(w: Tensor, run: Run) -> Tensor:
    if _are_neighbours(run.slots):
        return w[run.slots[0] : run.slots[-1] + 1]
    return w.index_select(0, torch.tensor(run.slots, device=w.device))


def _are_neighbours(slots: tuple[int, ...]) -> bool:
    return slots[-1] - slots[0] == len(slots) - 1  # slots of a run ascend


def _scaled(s_GCR: Tensor, weights: LoraWeights, run: Run) -> Tensor:
    return (s_GCR * _select(weights.scale_S, run)[:, None, None]).to(s_GCR.dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    if _is_small(left, right):
        return torch.bmm(left.expand(2, -1, -1), right.expand(2, -1, -1))[:1]
    return torch.bmm(left, right)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if _is_small(left, right):
        out += _product(left, right)
    else:
        out.baddbmm_(left, right)


def _is_small(left: Tensor, right: Tensor) -> bool:
    return len(left) == 1 and min(left.shape[1], right.shape[2]) < SMALL_ROWS


def _put(grad: Tensor, run: Run, left: Tensor, right: Tensor, accumulates: bool) -> None:
    """left @ right, added to the gradients of the run's segments or in their place."""
    grad, slots = grad if run.expert is None else grad[:, run.expert], run.slots
    value = _product(left, right).to(grad.dtype)
    if _are_neighbours(slots):
        target = grad[slots[0] : slots[-1] + 1]
        target.add_(value) if accumulates else target.copy_(value)
        return
    index = torch.tensor(slots, device=grad.device)
    grad.index_copy_(0, index, grad.index_select(0, index) + value if accumulates else value)
