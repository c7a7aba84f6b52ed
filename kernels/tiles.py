"""Rows → (slot, expert) segments, planned once per layer and used by every product of it, backward included.

Slots live in arenas, one per rank bucket, because one grouped product needs one rank. A row without an
adapter has slot -1 and is in no segment.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ArenaSegments:
    """The segments of one arena: `rows_T` (None: all rows, in order) split into G groups."""

    arena: int
    rows_T: Tensor | None
    slot_G: Tensor
    """Row of the arena that each group belongs to."""
    expert_G: Tensor | None
    ends_G: Tensor
    """int32; where each group's rows end."""
    slot_T: Tensor
    """Arena row of each of `rows_T`."""

    @functools.cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """(rows_GM, place_T): the rows of each group padded with row 0 to a common length, and where each row
        then lies in the flattened result."""
        ends_G = self.ends_G.long()
        starts_G = torch.cat([ends_G.new_zeros(1), ends_G[:-1]])
        counts_G = ends_G - starts_G
        # A multiple of 8: a product's bits then don't depend on how many rows it has.
        longest = -(-int(counts_G.max()) // 8) * 8
        offset_M = torch.arange(longest, device=ends_G.device)
        valid_GM = offset_M < counts_G[:, None]
        rows_GM = torch.where(valid_GM, starts_G[:, None] + offset_M, 0)
        return rows_GM, valid_GM.flatten().nonzero().squeeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlan:
    num_rows: int
    arenas: tuple[ArenaSegments, ...]


def plan_segments(arena_T: Tensor, slot_T: Tensor, expert_T: Tensor | None = None, num_experts: int = 0) -> SegmentPlan:
    """Segments of rows that are sorted by (arena, slot), or by (expert, arena, slot) where `expert_T` is given.

    `arena_T` is -1 for rows without an adapter. All tensors are int64 [T] on one device.
    """
    num_rows = len(arena_T)
    arenas = []
    for arena in torch.unique(arena_T).tolist():
        if arena < 0:
            continue
        rows_T = (arena_T == arena).nonzero().squeeze(1)
        slots = slot_T[rows_T]
        keys = slots if expert_T is None else expert_T[rows_T] * (int(slot_T.max()) + 1) + slots
        unique_G, counts_G = torch.unique_consecutive(keys, return_counts=True)
        stride = int(slot_T.max()) + 1
        arenas.append(
            ArenaSegments(
                arena=arena,
                rows_T=None if len(rows_T) == num_rows else rows_T,
                slot_G=unique_G if expert_T is None else unique_G % stride,
                expert_G=None if expert_T is None else unique_G // stride,
                ends_G=counts_G.cumsum(0).to(torch.int32),
                slot_T=slots,
            )
        )
    return SegmentPlan(num_rows=num_rows, arenas=tuple(arenas))
