"""Rows become segments, planned once: per pass for attention, per layer for experts, and used by
every product, backward included. For CPUs; `route.py` plans on a device.

Slots live in arenas, one per pair of ranks, so nothing is padded to the largest rank of a batch. A
row without an adapter has arena -1 and is in no segment.

Suffixes: T rows, G segments, R rows in the order of their experts, E experts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from populace.kernels.batches import Batches
from populace.kernels.segments import Segments


@dataclass(frozen=True, kw_only=True)
class SegmentPlan:
    """Whose rows are whose. No (arena, slot, expert) has two segments."""

    num_rows: int
    segments: Segments
    accumulates: bool = False
    """Backward adds to the gradients that are there instead of replacing them."""
    buckets: tuple[int, ...] | None = None
    """Of each arena: those of one bucket have ranks that are padded alike, and share memory. None:
    each arena has its own."""

    @property
    def is_empty(self) -> bool:
        return len(self.segments.start_G) == 0

    @functools.cached_property
    def batches(self) -> Batches:
        return Batches.of(self.segments, self.num_rows, self.buckets)


def plan_segments(
    arena_T: Tensor,
    slot_T: Tensor,
    expert_T: Tensor | None = None,
    *,
    accumulates: bool = False,
    buckets: tuple[int, ...] | None = None,
) -> SegmentPlan:
    """Segments of rows of which those of one (arena, slot, expert) lie together; int64 [T].
    `arena_T` is -1 for rows without an adapter; `buckets` as in `SegmentPlan`."""
    columns = [arena_T, slot_T] if expert_T is None else [arena_T, slot_T, expert_T]
    key_3T = torch.stack(columns).numpy()
    is_start_T = np.ones(key_3T.shape[1], np.bool_)
    is_start_T[1:] = (key_3T[:, 1:] != key_3T[:, :-1]).any(0)
    start_G = np.flatnonzero(is_start_T)
    count_G = np.diff(np.append(start_G, key_3T.shape[1]))
    mine = key_3T[0, start_G] >= 0
    start_G, count_G = start_G[mine], count_G[mine]
    segments = Segments(
        start_G=start_G,
        count_G=count_G,
        arena_G=key_3T[0, start_G],
        slot_G=key_3T[1, start_G],
        expert_G=None if expert_T is None else key_3T[2, start_G],
    )
    return SegmentPlan(
        num_rows=key_3T.shape[1], segments=segments, accumulates=accumulates, buckets=buckets
    )


def order_by_expert(expert_T: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Tensor]:
    """(order_R, ends_E): row numbers by expert, otherwise in their order, each expert's part filled
    up with -1 to a multiple of `multiple` rows; int32 ends of the experts' parts."""
    expert = expert_T.numpy()
    order = np.argsort(expert, kind="stable")
    rows_E = np.bincount(expert, minlength=num_experts)
    padded_E = -(-rows_E // multiple) * multiple
    ends_E = np.cumsum(padded_E)
    padded = np.full(int(ends_E[-1]), -1)
    shift_E = (ends_E - padded_E) - (np.cumsum(rows_E) - rows_E)
    padded[np.arange(len(order)) + np.repeat(shift_E, rows_E)] = order
    return torch.from_numpy(padded), torch.from_numpy(ends_E.astype(np.int32))
