"""One pass through the base: which rows, which adapters, which attention. What the replaced modules
look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from populace.configs.schema import TrainSettings
from populace.kernels.lora import Modules, Plan
from populace.kernels.plan import SegmentPlan, plan_segments
from populace.kernels.route import plan_routes
from populace.storage.errors import InvalidInput
from populace.workers.adapters.slab import Slab
from populace.workers.base.attention import Attention, AttentionPlan, PackedAttention
from populace.workers.base.rows import PackedRows
from populace.workers.device import Device

ROW_MULTIPLE = {"invariant": 8, "fast": 1}
"""Row counts of every product of the base are multiples of this: MKL and oneDNN take other paths,
with other bits, for a few odd small counts only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """How products are computed, and where."""

    device: Device
    backend: str
    row_multiple: int
    """Row counts of the base's products are multiples of this."""

    @staticmethod
    def of(train: TrainSettings, device: Device) -> Kernels:
        """The backend and the row multiple that the settings ask for, on this device.
        `InvalidInput` for a backend that doesn't run on it."""
        backend = device.backend if train.backend == "auto" else train.backend
        if (backend == "triton") != device.is_cuda:
            raise InvalidInput(
                f"train.backend is {train.backend!r}, which doesn't run where this shard computes, "
                f"on {device.kind}; use auto, or another base.device"
            )
        return Kernels(device=device, backend=backend, row_multiple=ROW_MULTIPLE[train.numerics])


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """Everything that one pass through the base depends on besides its weights."""

    rows: PackedRows
    attention: Attention
    slab: Slab | None
    """None runs the base alone."""
    kernels: Kernels
    plan: Plan
    """Of attention's LoRA; experts' is planned layer by layer."""
    routing: list[Tensor] | None = field(default=None)
    """Where given, every MoE block appends its selection, [T, K] int16, in layer order."""
    route_counts: list[Tensor] = field(default_factory=list)
    """Per MoE block with a record to replay: rows that were recorded, and those of them that
    it would send elsewhere."""

    @staticmethod
    def of(
        rows: PackedRows,
        attention: Attention,
        slab: Slab | None,
        kernels: Kernels,
        *,
        record_routing: bool = False,
        accumulates: bool = False,
    ) -> ForwardPass:
        """A pass over `rows`, which were uploaded. `record_routing`: every MoE block tells which
        experts it chose; `accumulates`: backward adds to the adapters' gradients instead of
        replacing them."""
        return ForwardPass(
            rows=rows,
            attention=attention,
            slab=slab,
            kernels=kernels,
            plan=_plan_dense(rows, slab, kernels, accumulates),
            routing=[] if record_routing else None,
        )

    @staticmethod
    def packed(
        rows: PackedRows, slab: Slab | None, kernels: Kernels, *, keep: bool = False, **flags: bool
    ) -> ForwardPass:
        """A pass over whole groups, packed on the host. `keep`: attention keeps keys and values;
        other `flags` as in `of`."""
        there, plan = kernels.device.upload(rows, AttentionPlan.of(rows))
        return ForwardPass.of(there, PackedAttention(plan, keep), slab, kernels, **flags)

    def count_out_of_route(self, is_recorded_T: Tensor, differs_T: Tensor) -> None:
        """Note how many rows of a block have a recorded selection, and how many differ."""
        self.route_counts.append(
            torch.stack([is_recorded_T.sum(), (is_recorded_T & differs_T).sum()])
        )

    def lora(self, modules: Sequence[str], layer: int) -> Modules:
        """What adapters have on these modules; nothing for the base alone."""
        return () if self.slab is None else [self.slab.lora(name, layer) for name in modules]  # type: ignore[return-value]

    def recorded_TLK(self) -> Tensor:
        """The selections of every MoE block, [T, L, K]."""
        assert self.routing is not None
        return torch.stack(self.routing, dim=1)


def _plan_dense(rows: PackedRows, slab: Slab | None, kernels: Kernels, accumulates: bool) -> Plan:
    if kernels.device.is_cuda:
        return plan_routes(
            rows.slot_T,
            None,
            1,
            1 if slab is None else slab.capacity,
            is_empty=slab is None or not rows.has_adapters,
            accumulates=accumulates,
        )
    return plan_on_cpu(slab, rows.arena_T, rows.slot_T, None, accumulates=accumulates)


def plan_on_cpu(
    slab: Slab | None,
    arena_T: Tensor,
    slot_T: Tensor,
    expert_T: Tensor | None,
    *,
    accumulates: bool,
) -> SegmentPlan:
    """Segments of rows on a CPU, on attention or (with `expert_T`) on experts; rows whose adapters
    have nothing there are in none."""
    if slab is None:
        return plan_segments(arena_T, slot_T, expert_T, accumulates=accumulates)
    arena_T = slab.covered(arena_T, is_expert=expert_T is not None)
    return plan_segments(arena_T, slot_T, expert_T, accumulates=accumulates, buckets=slab.buckets)


class PassHolder:
    """Where the modules of one base find the pass that runs; set by `BaseModel.hidden` alone."""

    def __init__(self) -> None:
        self._current: ForwardPass | None = None

    @property
    def current(self) -> ForwardPass:
        assert self._current is not None, "a base is called through BaseModel.hidden"
        return self._current

    def set(self, forward_pass: ForwardPass | None) -> None:
        self._current = forward_pass
