"""Products of many adapters to try kernels on, and what plain algebra says about them. Needs torch
and NumPy alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from populace.kernels.lora import FrozenProduct, LoraWeights, lora_product
from populace.kernels.plan import plan_segments
from populace.kernels.pointers import LoraPointers
from populace.kernels.route import RoutePlan, plan_routes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """Rows of adapters in several arenas, sorted as the step sorts them, and what a product
    needs."""

    base: FrozenProduct
    modules: list[list[LoraWeights]]
    arena: torch.Tensor
    slot: torch.Tensor
    expert: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor

    @property
    def has_experts(self) -> bool:
        return self.base.ends_E is not None

    def to(self, device: str) -> Case:
        def moved(record):
            values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
            return dataclasses.replace(
                record,
                **{
                    name: value.to(device)
                    for name, value in values.items()
                    if isinstance(value, torch.Tensor)
                },
            )

        modules = [[moved(w) for w in module] for module in self.modules]
        return dataclasses.replace(moved(self), base=moved(self.base), modules=modules)

    def run(self, backend: str, *, accumulates: bool = False) -> list[torch.Tensor]:
        """Y, dX, and dA, dB of every module and arena."""
        if backend == "triton":
            return self._run_on_slots(accumulates)
        plan = plan_segments(
            self.arena,
            self.slot,
            self.expert if self.has_experts else None,
            accumulates=accumulates,
        )
        x = self.x.clone().requires_grad_()
        y = lora_product(x, self.base, self.modules, plan, backend)
        y.backward(self.dy)
        return [
            y.detach(),
            x.grad,
            *(g.clone() for m in self.modules for w in m for g in (w.grad_a, w.grad_b)),
        ]

    def _run_on_slots(self, accumulates: bool) -> list[torch.Tensor]:
        """As a device does it: rows ordered by the plan, and slots with memory of their own."""
        plan, slots = self.routes(accumulates=accumulates), SlotsOf(self.modules)
        x = self.x[plan.row_R].clone().requires_grad_()
        base = self.base
        if self.has_experts:
            base = dataclasses.replace(base, ends_E=plan.ends_E, tile_I4=plan.experts_I4)
        y = lora_product(x, base, slots.pointers, plan, "triton")
        y.backward(self.dy[plan.row_R])
        place = plan.place_TK.squeeze(1)
        grads = slots.grads()
        for module, own in zip(self.modules, grads, strict=True):
            for w, (grad_a, grad_b) in zip(module, own, strict=True):
                w.grad_a.copy_(grad_a)
                w.grad_b.copy_(grad_b)
        return [
            y.detach()[place],
            x.grad[place],
            *(grad for own in grads for pair in own for grad in pair),
        ]

    @property
    def num_slots(self) -> int:
        """Of each arena."""
        return len(self.modules[0][0].scale_S)

    def routes(self, *, accumulates: bool = False) -> RoutePlan:
        """The plan of a device; the slots of arena i come behind those of the arenas before."""
        lane = torch.where(self.arena < 0, -1, self.arena * self.num_slots + self.slot)
        return plan_routes(
            lane,
            self.expert.unsqueeze(1) if self.has_experts else None,
            len(self.base.w) if self.has_experts else 1,
            len(self.modules[0]) * self.num_slots,
            is_empty=bool((self.arena < 0).all()),
            accumulates=accumulates,
        )


class SlotsOf:
    """Memory of its own for every slot of every arena, filled from the arenas' tensors."""

    def __init__(self, modules: list[list[LoraWeights]]) -> None:
        self.modules = modules
        self.flats = [
            [
                [_flat(a, b) for a, b in zip(first, second, strict=True)]
                for arena in module
                for first, second in ((arena.a, arena.b), (arena.grad_a, arena.grad_b))
            ]
            for module in modules
        ]
        self.pointers = [
            self._pointers(module, own) for module, own in zip(modules, self.flats, strict=True)
        ]

    def _pointers(self, module: list[LoraWeights], flats: list[list[torch.Tensor]]) -> LoraPointers:
        device, inner, outer = module[0].a.device, module[0].a.shape[-1], module[0].b.shape[-2]

        def addresses(which: int) -> torch.Tensor:
            own = [flat.data_ptr() for arena in flats[which::2] for flat in arena]
            return torch.tensor(own, dtype=torch.int64, device=device)

        ranks = [w.a.shape[-2] for w in module for _ in w.scale_S]
        return LoraPointers(
            weights_S=addresses(0),
            grads_S=addresses(1),
            rank_S=torch.tensor(ranks, device=device),
            scale_S=torch.cat([w.scale_S for w in module]),
            ranks=tuple(sorted(set(ranks))),
            inner=inner,
            offset=0,
            expert_step=inner + outer if module[0].a.ndim == 4 else 0,
        )

    def grads(self) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Gradients of A and B by module and arena, shaped as the arenas' are."""
        found = []
        for module, flats in zip(self.modules, self.flats, strict=True):
            own = []
            for w, arena in zip(module, flats[1::2], strict=True):
                flat_SP = torch.stack(arena)
                if w.a.ndim == 4:
                    flat_SP = flat_SP.view(*w.a.shape[:2], -1)
                size = w.a.shape[-1] * w.a.shape[-2]
                own.append(
                    (
                        flat_SP[..., :size].reshape(w.a.shape).clone(),
                        flat_SP[..., size:].reshape(w.b.shape).clone(),
                    )
                )
            found.append(own)
        return found


def _flat(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A slot's A and B, expert by expert where there are some."""
    lead = a.ndim - 2
    return torch.cat([a.flatten(lead), b.flatten(lead)], dim=lead).flatten()


def make_case(
    counts: list[tuple[int, int, int, int]], ranks: list[int], slots: int, experts: int,
    inner: int, out: int,
    dtype: torch.dtype, num_modules: int = 1, seed: int = 0,
) -> Case:  # fmt: skip
    """`counts`: (expert, arena, slot, rows) of every segment; arena -1 for rows without an
    adapter."""
    torch.manual_seed(seed)
    columns = [(e, a, s) for e, a, s, n in sorted(counts) for _ in range(n)]
    expert, arena, slot = (
        torch.tensor([row[i] for row in columns], dtype=torch.int64) for i in range(3)
    )

    def weights(rank: int) -> LoraWeights:
        lead = (slots, experts) if experts else (slots,)
        # fp16 has few exponents: values that keep sums near one.
        a, b = (
            torch.randn(*lead, rank, inner) / inner**0.5,
            torch.randn(*lead, out // num_modules, rank) / rank**0.5,
        )
        return LoraWeights(
            a=a, b=b, grad_a=torch.full_like(a, torch.nan), grad_b=torch.full_like(b, torch.nan),
            scale_S=torch.rand(slots) + 0.5,
        )  # fmt: skip

    if experts:
        ends = torch.bincount(expert, minlength=experts).cumsum(0).to(torch.int32)
        base = FrozenProduct(
            w=(torch.randn(experts, out, inner) / inner**0.5).to(dtype), ends_E=ends
        )
    else:
        base = FrozenProduct(
            w=(torch.randn(out, inner) / inner**0.5).to(dtype), bias_F=torch.randn(out).to(dtype)
        )
    return Case(
        base=base,
        modules=[[weights(rank) for rank in ranks] for _ in range(num_modules)],
        arena=arena,
        slot=torch.where(arena < 0, -1, slot),
        expert=expert,
        x=torch.randn(len(columns), inner).to(dtype),
        dy=torch.randn(len(columns), out).to(dtype),
    )


def exact(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """What `Case.run` gives, by torch's own autograd, one segment at a time, in `dtype`. NaN where
    no segment is."""
    x = case.x.to(dtype).requires_grad_()
    rows = list(zip(case.expert.tolist(), case.arena.tolist(), case.slot.tolist(), strict=True))
    pieces, leaves, start = [], [], 0
    while start < len(rows):
        end = start
        while end < len(rows) and rows[end] == rows[start]:
            end += 1
        expert, arena, slot = rows[start]
        part = x[start:end]
        base = (case.base.w[expert] if case.has_experts else case.base.w).to(dtype)
        y = part @ base.T
        if case.base.bias_F is not None:
            y = y + case.base.bias_F.to(dtype)
        if arena >= 0:
            where = (slot, expert) if case.has_experts else (slot,)
            own = [
                tuple(t[where].to(dtype).requires_grad_() for t in (m[arena].a, m[arena].b))
                for m in case.modules
            ]
            scale = [m[arena].scale_S[slot].to(dtype) for m in case.modules]
            y = y + torch.cat(
                [(s * (part @ a.T)) @ b.T for s, (a, b) in zip(scale, own, strict=True)], 1
            )
            leaves.append((arena, where, own))
        pieces.append(y)
        start = end
    y = torch.cat(pieces)
    y.backward(case.dy.to(dtype))
    grads = [
        [tuple(torch.full_like(t, torch.nan, dtype=dtype) for t in (w.a, w.b)) for w in m]
        for m in case.modules
    ]
    for arena, where, own in leaves:
        for module, leaf in zip(grads, own, strict=True):
            for grad, tensor in zip(module[arena], leaf, strict=True):
                grad[where] = tensor.grad
    return [y.detach(), x.grad, *(grad for module in grads for pair in module for grad in pair)]


def assert_accurate(got: list[torch.Tensor], case: Case, dtype: torch.dtype) -> None:
    """Within 2 · error(torch, same dtype) + 1e-6 of fp64, and nothing written where no segment
    is."""
    for name, value, want, plain in zip(
        ["y", "dx", *["grad"] * 99],
        got,
        exact(case, torch.float64),
        exact(case, dtype),
        strict=False,
    ):
        assert torch.equal(value.isnan(), want.isnan()), f"{name}: wrong places were written"
        error = (value.double() - want).abs().nan_to_num().max()
        allowed = 2 * (
            plain.double() - want
        ).abs().nan_to_num().max() + 1e-6 * want.nan_to_num().abs().max().clamp(min=1)
        assert error <= allowed, (name, float(error), float(allowed))


def random_counts(
    seed: int, num_segments: int, arenas: int, slots: int, experts: int, most: int
) -> list:
    random = np.random.default_rng(seed)
    keys = {
        (
            int(random.integers(max(experts, 1))),
            int(random.integers(-1, arenas)),
            int(random.integers(slots)),
        )
        for _ in range(num_segments)
    }
    # Empty segments are those that no row names; one-row segments come first.
    return [
        (e, a, s if a >= 0 else 0, int(n))
        for (e, a, s), n in zip(sorted(keys), random.integers(1, most, len(keys)), strict=True)
    ]


CASES = {
    "one row": dict(counts=[(0, 0, 1, 1)], ranks=[4], slots=3, experts=0, inner=24, out=20),
    "one row of an expert": dict(
        counts=[(3, 0, 1, 1)], ranks=[8], slots=3, experts=4, inner=24, out=32
    ),
    "no adapter": dict(counts=[(0, -1, 0, 9)], ranks=[4], slots=2, experts=0, inner=24, out=20),
    "long": dict(
        counts=[(0, 0, 0, 257), (0, 0, 1, 63), (0, 0, 2, 100)],
        ranks=[16],
        slots=3,
        experts=0,
        inner=63,
        out=100,
    ),
    "ranks 4 to 64": dict(
        counts=random_counts(1, 60, 6, 5, 0, 40),
        ranks=[4, 8, 12, 20, 32, 64],
        slots=5,
        experts=0,
        inner=40,
        out=36,
    ),
    "gate and up": dict(
        counts=random_counts(2, 80, 2, 8, 4, 30),
        ranks=[4, 16],
        slots=8,
        experts=4,
        inner=48,
        out=64,
        num_modules=2,
    ),
    "experts of two ranks that need no filling up": dict(
        counts=[(0, 0, 0, 8), (0, 1, 1, 8), (1, 0, 0, 8), (1, 1, 1, 8)],
        ranks=[4, 8],
        slots=2,
        experts=2,
        inner=24,
        out=32,
    ),
    "64 experts": dict(
        counts=random_counts(3, 90, 2, 4, 64, 9),
        ranks=[4, 8],
        slots=4,
        experts=64,
        inner=16,
        out=24,
    ),
    "256 adapters": dict(
        counts=[(0, 0, s, 1 + s % 5) for s in range(256)],
        ranks=[8],
        slots=256,
        experts=0,
        inner=32,
        out=32,
    ),
}
