"""The LoRA delta of many adapters at once, forward and backward. The only public entry of this folder.

    S = X Aᵀ        Y += s · S Bᵀ                               (Hu et al., https://arxiv.org/abs/2106.09685)
    dS = s · dY B   dB = s · dYᵀ S    dA = dSᵀ X    dX += dS A

Suffixes: T rows, G segments, S slots of an arena, E experts, D in, F out, R rank as stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from populace.kernels import grouped, reference
from populace.kernels.tiles import ArenaSegments, SegmentPlan

BACKENDS: dict[str, ModuleType] = {"grouped": grouped, "reference": reference}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraWeights:
    """One module's tensors in one arena: views of its slab, [S, R, D] and [S, F, R], with an expert axis after
    the slots for expert modules."""

    a: Tensor
    b: Tensor
    grad_a: Tensor
    grad_b: Tensor
    scale_S: Tensor
    """alpha / rank of each slot, fp32."""


def add_lora(y_TF: Tensor, x_TD: Tensor, weights: Sequence[LoraWeights], plan: SegmentPlan, backend: str) -> Tensor:
    """`y_TF` plus every row's own adapter delta; `weights[i]` belongs to arena i of the plan.

    Backward adds the adapters' gradients into `grad_a` and `grad_b` (fp32) instead of returning them: a slab
    is far larger than what one wave touches. Rows of slots outside the plan are neither read nor written.
    """
    if not plan.arenas:
        return y_TF
    delta: Tensor = _AddLora.apply(y_TF, x_TD, tuple(weights), plan, BACKENDS[backend])  # type: ignore[no-untyped-call]
    return delta


class _AddLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_TF: Tensor,
        x_TD: Tensor,
        weights: tuple[LoraWeights, ...],
        plan: SegmentPlan,
        backend: ModuleType,
    ) -> Tensor:
        shrunk = []
        out_TF = y_TF.clone()
        for segments in plan.arenas:
            a_GRD, b_GFR = _gather(weights[segments.arena], segments, x_TD.dtype)
            s_TR = backend.grouped_rows(_rows(x_TD, segments), a_GRD.transpose(1, 2), segments)
            delta_TF = backend.grouped_rows(
                s_TR * _scale(weights[segments.arena], segments, s_TR), b_GFR.transpose(1, 2), segments
            )
            _add_rows(out_TF, delta_TF, segments)
            shrunk.append(s_TR)
        ctx.save_for_backward(x_TD, *shrunk)
        ctx.weights, ctx.plan, ctx.backend = weights, plan, backend
        return out_TF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TF,) = grads
        x_TD, *shrunk = ctx.saved_tensors
        backend = ctx.backend
        dx_TD = torch.zeros_like(x_TD)
        for segments, s_TR in zip(ctx.plan.arenas, shrunk, strict=True):
            weights = ctx.weights[segments.arena]
            a_GRD, b_GFR = _gather(weights, segments, x_TD.dtype)
            arena_dy_TF = _rows(dy_TF, segments)
            scale_T1 = _scale(weights, segments, s_TR)
            ds_TR = backend.grouped_rows(arena_dy_TF, b_GFR, segments) * scale_T1
            db_GFR = backend.grouped_outer(arena_dy_TF, s_TR * scale_T1, segments)
            da_GRD = backend.grouped_outer(ds_TR, _rows(x_TD, segments), segments)
            _accumulate(weights.grad_a, da_GRD, segments)
            _accumulate(weights.grad_b, db_GFR, segments)
            _add_rows(dx_TD, backend.grouped_rows(ds_TR, a_GRD, segments), segments)
        return dy_TF, dx_TD, None, None, None


def _index(segments: ArenaSegments) -> tuple[Tensor, ...]:
    return (segments.slot_G,) if segments.expert_G is None else (segments.slot_G, segments.expert_G)


def _gather(weights: LoraWeights, segments: ArenaSegments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    index = _index(segments)
    return weights.a[index].to(dtype), weights.b[index].to(dtype)


def _accumulate(grad: Tensor, value_G: Tensor, segments: ArenaSegments) -> None:
    # A (slot, expert) pair has one segment, so nothing is added twice and the order is fixed.
    index = _index(segments)
    grad[index] = grad[index] + value_G.to(grad.dtype)


def _scale(weights: LoraWeights, segments: ArenaSegments, like: Tensor) -> Tensor:
    return weights.scale_S[segments.slot_T].unsqueeze(1).to(like.dtype)


def _rows(x_TD: Tensor, segments: ArenaSegments) -> Tensor:
    return x_TD if segments.rows_T is None else x_TD[segments.rows_T]


def _add_rows(out_TF: Tensor, value_TF: Tensor, segments: ArenaSegments) -> None:
    if segments.rows_T is None:
        out_TF += value_TF
    else:
        out_TF.index_add_(0, segments.rows_T, value_TF)  # each row once
