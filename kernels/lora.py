"""A frozen product plus many adapters' LoRA deltas, forward and backward.

    S = X Aᵀ        Y += s · S Bᵀ                               (Hu et al., https://arxiv.org/abs/2106.09685)
    dS = s · dY B   dB = s · dYᵀ S    dA = dSᵀ X    dX += dS A

Suffixes: T rows, S slots of an arena, E experts, I tiles, D in, F out, R rank.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

from populace.kernels.plan import SegmentPlan
from populace.kernels.pointers import LoraPointers
from populace.kernels.route import RoutePlan

BACKENDS = {"grouped": "grouped", "reference": "reference", "triton": "triton_lora"}
"""Modules of this folder with `add_deltas` and `add_gradients`, as `reference` describes them.
`triton` is for CUDA devices and takes `LoraPointers` and a `RoutePlan`; the others are for CPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraWeights:
    """One module's tensors in one arena: views of its slab, [S, R, D] and [S, F, R], with an expert
    axis after the slots for expert modules."""

    a: Tensor
    b: Tensor
    grad_a: Tensor
    grad_b: Tensor
    scale_S: Tensor
    """alpha / rank of each slot, fp32, contiguous."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenProduct:
    """Y = X Wᵀ (+ bias): one [F, D] matrix for all rows, or one of [E, F, D] for the rows of each
    expert."""

    w: Tensor
    bias_F: Tensor | None = None
    ends_E: Tensor | None = None
    """int32; where each expert's rows end. None: one matrix for all rows."""
    tile_I4: Tensor | None = None
    """The experts' tiles of a `RoutePlan`, where torch's grouped product would wait for the
    host."""

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.ends_E is None:
            return linear(x_TD, self.w, self.bias_F)
        return self._grouped(x_TD, self.w)

    def backward(self, dy_TF: Tensor) -> Tensor:
        return dy_TF @ self.w if self.ends_E is None else self._grouped(dy_TF, self.w.mT)

    def _grouped(self, x_TD: Tensor, w_EFD: Tensor) -> Tensor:
        if not len(x_TD):
            return x_TD.new_empty(0, w_EFD.shape[1])
        if self.tile_I4 is None:
            return grouped_mm(x_TD, w_EFD.mT, offs=self.ends_E)
        from populace.kernels.triton_experts import experts_product  # not installed everywhere

        return experts_product(x_TD, w_EFD, self.tile_I4)


Modules = Sequence[Sequence[LoraWeights | None]] | Sequence[LoraPointers]
"""By module: the tensors of each arena of a slab on a CPU (None of one without them), or the slots'
tables on a device."""
Plan = SegmentPlan | RoutePlan


def lora_product(
    x_TD: Tensor,
    base: FrozenProduct,
    modules: Modules,
    plan: Plan,
    backend: str,
) -> Tensor:
    """The frozen product of every row plus its own adapter's delta, [T, F].

    `modules` share the product's columns evenly (a fused gate-and-up has two). Backward leaves the
    adapters' gradients where they are to be (fp32) instead of returning them: a slab is far larger
    than what one wave touches. Slots outside the plan are neither read nor written. Kept for
    backward: X and S.
    """
    if plan.is_empty and not (torch.is_grad_enabled() and x_TD.requires_grad):
        return base.forward(x_TD)
    product: Tensor = _LoraProduct.apply(x_TD, base, modules, plan, _backend(backend))  # type: ignore[no-untyped-call]
    return product


def _backend(name: str) -> ModuleType:
    # By name, because Triton is not installed everywhere.
    return importlib.import_module(f"populace.kernels.{BACKENDS[name]}")


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        base: FrozenProduct,
        modules: Modules,
        plan: Plan,
        backend: ModuleType,
    ) -> Tensor:
        y_TF = base.forward(x_TD)
        ctx.shrunk = [] if plan.is_empty else backend.add_deltas(y_TF, x_TD, modules, plan)
        ctx.save_for_backward(x_TD)
        ctx.base, ctx.modules, ctx.plan, ctx.backend = base, modules, plan, backend
        return y_TF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD,) = ctx.saved_tensors
        dy_TF = grads[0].contiguous()
        dx_TD = ctx.base.backward(dy_TF)
        if not ctx.plan.is_empty:
            ctx.backend.add_gradients(dx_TD, dy_TF, x_TD, ctx.shrunk, ctx.modules, ctx.plan)
        return dx_TD, None, None, None, None
