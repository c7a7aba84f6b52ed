"""Rows → (slot, expert) segments → tiles, planned once per layer and used by every product of it, backward included.

Slots live in arenas, one per rank bucket, so nothing is padded to the largest rank of a batch. A row without an
adapter has slot -1 and is in no segment. The plan is made on the host: it is a few thousand integers.

Suffixes: T rows, G segments, I tiles.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring segments of equally many rows under one expert: one batched product, without moving a row."""

    start: int
    """First row of the first segment."""
    num_rows: int
    """Of each segment."""
    slots: tuple[int, ...]
    """Arena row of each segment."""
    expert: int | None

    @property
    def end(self) -> int:
        return self.start + self.num_rows * len(self.slots)


@dataclass(frozen=True, kw_only=True)
class ArenaSegments:
    """The segments of one arena, in the order of their rows. No (slot, expert) pair has two."""

    arena: int
    start_G: Ints
    count_G: Ints
    slot_G: Ints
    expert_G: Ints | None
    """None for dense modules."""

    @property
    def num_rows(self) -> int:
        return int(self.count_G.sum())

    @functools.cached_property
    def offset_G(self) -> Ints:
        """Where each segment's rows begin when the arena's rows are put side by side."""
        return np.cumsum(self.count_G) - self.count_G

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        ends_G = self.start_G + self.count_G
        joins = (self.start_G[1:] == ends_G[:-1]) & (self.count_G[1:] == self.count_G[:-1])
        if self.expert_G is not None:
            joins &= self.expert_G[1:] == self.expert_G[:-1]
        bounds = [0, *(np.flatnonzero(~joins) + 1).tolist(), len(self.start_G)]
        starts, counts, slots = self.start_G.tolist(), self.count_G.tolist(), self.slot_G.tolist()
        experts = None if self.expert_G is None else self.expert_G.tolist()
        return tuple(
            Run(
                start=starts[first],
                num_rows=counts[first],
                slots=tuple(slots[first:last]),
                expert=None if experts is None else experts[first],
            )
            for first, last in itertools.pairwise(bounds)
        )

    def tiles(self, height: int) -> tuple[Ints, Ints]:
        """(segment_I, offset_I): tiles of at most `height` rows. Each starts `offset_I` rows into its segment and
        never leaves it."""
        per_G = -(-self.count_G // height)
        segment_I = np.repeat(np.arange(len(per_G)), per_G)
        return segment_I, (np.arange(len(segment_I)) - np.repeat(np.cumsum(per_G) - per_G, per_G)) * height


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlan:
    """Whose rows are whose."""

    arenas: tuple[ArenaSegments, ...]
    accumulates: bool = False
    """Backward adds to the gradients that are there instead of replacing them."""


def plan_segments(
    arena_T: Tensor, slot_T: Tensor, expert_T: Tensor | None = None, *, accumulates: bool = False
) -> SegmentPlan:
    """Segments of rows of which those of one (arena, slot, expert) lie together; int64 [T]. `arena_T` is -1 for rows
    without an adapter."""
    keys = [arena_T, slot_T] if expert_T is None else [arena_T, slot_T, expert_T]
    key_3T = torch.stack(keys).cpu().numpy()
    if key_3T.shape[1] == 0:
        return SegmentPlan(arenas=(), accumulates=accumulates)
    start_G = np.flatnonzero(np.concatenate([[True], (key_3T[:, 1:] != key_3T[:, :-1]).any(0)]))
    count_G = np.diff(np.append(start_G, key_3T.shape[1]))
    arena_G = key_3T[0, start_G]
    arenas = []
    for arena in np.unique(arena_G[arena_G >= 0]).tolist():
        mine = arena_G == arena
        first = start_G[mine]
        arenas.append(
            ArenaSegments(
                arena=arena,
                start_G=first,
                count_G=count_G[mine],
                slot_G=key_3T[1, first],
                expert_G=None if expert_T is None else key_3T[2, first],
            )
        )
    return SegmentPlan(arenas=tuple(arenas), accumulates=accumulates)


def order_by_expert(
    arena_T: Tensor, slot_T: Tensor, expert_T: Tensor, num_experts: int, multiple: int
) -> tuple[Tensor, Tensor]:
    """(order_R, ends_E): row numbers by (expert, arena, length of the segment, slot), each expert's part filled up with
    -1 to a multiple of `multiple` rows; int32 ends of the experts' parts.

    Segments of one length come together because a run of them is one product.
    """
    arena, slot, expert = (column.cpu().numpy() for column in (arena_T, slot_T, expert_T))
    num_slots = int(slot.max(initial=0)) + 2
    key = ((arena + 1) * num_slots + slot + 1) * num_experts + expert
    _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
    order = np.lexsort((slot, counts[inverse], arena, expert))
    rows_E = np.bincount(expert, minlength=num_experts)
    padded_E = -(-rows_E // multiple) * multiple
    ends_E = np.cumsum(padded_E)
    padded = np.full(int(ends_E[-1]), -1)
    shift_E = (ends_E - padded_E) - (np.cumsum(rows_E) - rows_E)
    padded[np.arange(len(order)) + np.repeat(shift_E, rows_E)] = order
    return torch.from_numpy(padded).to(expert_T.device), torch.from_numpy(ends_E.astype(np.int32)).to(expert_T.device)
