"""Rows → (slot, expert) segments → tiles, planned once: per step for attention, per layer for experts, and used by
every product, backward included.

Slots live in arenas, one per rank bucket, so nothing is padded to the largest rank of a batch. A row without an
adapter has arena -1 and is in no segment. The plan is made on the host: it is a few thousand integers.

Suffixes: T rows, G segments, I tiles, U tile rows, E experts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Neighbouring rows of one adapter (and one expert), in the order of their rows."""

    start_G: Ints
    count_G: Ints
    arena_G: Ints
    slot_G: Ints
    """Row of the arena."""
    expert_G: Ints | None
    """None for dense modules."""

    def index(self, segment_G: Ints, device: torch.device) -> slice | tuple[Tensor, ...]:
        """Which tensors of an arena these segments use; a slice where dense ones use neighbouring slots in order."""
        slot_G = self.slot_G[segment_G]
        if self.expert_G is None and (np.diff(slot_G) == 1).all():
            return slice(int(slot_G[0]), int(slot_G[-1]) + 1)
        columns = (slot_G,) if self.expert_G is None else (slot_G, self.expert_G[segment_G])
        return tuple(torch.from_numpy(column_G).to(device) for column_G in columns)


@dataclass(frozen=True, kw_only=True)
class SegmentPlan:
    """Whose rows are whose. No (arena, slot, expert) has two segments."""

    num_rows: int
    segments: Segments
    device: torch.device
    """Where the rows are."""
    accumulates: bool = False
    """Backward adds to the gradients that are there instead of replacing them."""

    @property
    def is_empty(self) -> bool:
        return len(self.segments.start_G) == 0

    @functools.cached_property
    def batches(self) -> Batches:
        return Batches.of(self)

    @functools.cached_property
    def tiles(self) -> tuple[ArenaTiles, ...]:
        return tuple(_arena_tiles(self.segments, self.device))


def plan_segments(
    arena_T: Tensor, slot_T: Tensor, expert_T: Tensor | None = None, *, accumulates: bool = False
) -> SegmentPlan:
    """Segments of rows of which those of one (arena, slot, expert) lie together; int64 [T]. `arena_T` is -1 for rows
    without an adapter."""
    columns = [arena_T, slot_T] if expert_T is None else [arena_T, slot_T, expert_T]
    key_3T = torch.stack(columns).cpu().numpy()
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
    return SegmentPlan(num_rows=key_3T.shape[1], segments=segments, device=arena_T.device, accumulates=accumulates)


def tiles_by_height(count_G: Ints, heights: Sequence[int]) -> Iterator[tuple[int, Ints, Ints]]:
    """(height, segment_I, offset_I) for ascending heights: a segment of `count_G` rows is cut into tiles of the lowest
    height that holds it, else of the largest. A tile starts `offset_I` rows into its segment and never leaves it."""
    height_G = np.asarray(heights)[np.searchsorted(heights[:-1], count_G)]
    for height in heights:
        per_G = np.where(height_G == height, -(-count_G // height), 0)
        segment_I = np.repeat(np.arange(len(per_G)), per_G)
        if len(segment_I):
            yield height, segment_I, (np.arange(len(segment_I)) - np.repeat(np.cumsum(per_G) - per_G, per_G)) * height


SHORT, TALL = 16, 64
"""Heights of Triton's tiles: segments of at most 16 rows, as decoding has them, don't pay for 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaTiles:
    """One arena's segments as Triton's kernels read them. Each row of a table, int64 [I, 5], is a tile: its first row
    among all rows, its first row among the arena's, how many rows, slot, expert (0 for dense modules)."""

    arena: int
    num_rows: int
    whole_G5: Tensor
    """The segments themselves."""
    by_height: tuple[tuple[int, Tensor], ...]
    """(height, their tiles of that height)."""


def _arena_tiles(segments: Segments, device: torch.device) -> Iterator[ArenaTiles]:
    expert_G = np.zeros_like(segments.slot_G) if segments.expert_G is None else segments.expert_G
    tables: list[tuple[int, int, Ints]] = []
    for arena in np.unique(segments.arena_G).tolist():
        mine = segments.arena_G == arena
        count_G = segments.count_G[mine]
        own_G = np.cumsum(count_G) - count_G
        whole_G5 = np.stack([segments.start_G[mine], own_G, count_G, segments.slot_G[mine], expert_G[mine]], 1)
        tables.append((arena, 0, whole_G5))
        for height, segment_I, offset_I in tiles_by_height(count_G, (SHORT, TALL)):
            tile_I5 = whole_G5[segment_I]
            tile_I5[:, :2] += offset_I[:, None]
            tile_I5[:, 2] = np.minimum(tile_I5[:, 2] - offset_I, height)
            tables.append((arena, height, tile_I5))
    moved = _move([table for *_, table in tables], device)
    for arena, group in itertools.groupby(zip(tables, moved, strict=True), lambda pair: pair[0][0]):
        ((_, _, table), whole), *tiles = group
        by_height = tuple((height, tile_I5) for (_, height, _), tile_I5 in tiles)
        yield ArenaTiles(arena=arena, num_rows=int(table[:, 2].sum()), whole_G5=whole, by_height=by_height)


def _move(tables: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """All in one copy. Each begins at a multiple of 16 bytes: Triton would compile its kernels anew for one that
    doesn't."""
    even = [np.concatenate([table, table[-1:]]) if len(table) % 2 else table for table in tables]
    parts = torch.split(torch.from_numpy(np.concatenate(even)).to(device), [len(table) for table in even])
    return [part[: len(table)] for table, part in zip(tables, parts, strict=True)]


HEIGHTS = np.array([1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64])
"""Segments of at most 64 rows are filled up to the next of these, so that many become one batched product. 5 to 7 and 9
to 11 are missing: MKL splits a lone product of so many rows over threads, with other bits."""
LARGE_STEP = 32
"""Longer segments of experts are filled up to multiples of this; longer dense ones, which mostly lie right as they are,
not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Segments of one arena and one height."""

    start: int
    """First of its rows among all tile rows."""
    height: int
    first: int
    """First of its segments among the arena's."""
    size: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.size * self.height)

    @property
    def members(self) -> slice:
        return slice(self.first, self.first + self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaBatches:
    """One arena's segments, batch by batch."""

    arena: int
    segment_G: Ints
    index: slice | tuple[Tensor, ...]
    """Which of the arena's tensors they use."""
    batches: tuple[Batch, ...]
    rows: slice
    """Its tile rows."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Segments put together into batched products. How a segment is filled up depends on its own length alone."""

    arenas: tuple[ArenaBatches, ...]
    source_U: Tensor | None
    """The row that each tile row is a copy of: what fills a segment up copies its own last row. Behind all tiles come
    the rows without an adapter. None: the rows as they are."""
    place_T: Tensor | None
    """The tile row of each row."""
    slot_U: Tensor
    is_filling_U: Tensor

    @staticmethod
    def of(plan: SegmentPlan) -> Batches:
        segments = plan.segments
        count_G = segments.count_G
        step = 1 if segments.expert_G is None else LARGE_STEP
        large_G = -(-count_G // step) * step
        small_G = HEIGHTS[np.searchsorted(HEIGHTS, np.minimum(count_G, HEIGHTS[-1]))]
        height_G = np.where(count_G > HEIGHTS[-1], large_G, small_G)
        is_whole = int(count_G.sum()) == plan.num_rows and bool((height_G == count_G).all())
        in_place = is_whole and bool((np.diff(segments.arena_G) >= 0).all())
        order_G = np.arange(len(count_G)) if in_place else np.lexsort((height_G, segments.arena_G))
        height_G, arena_G, count_G = height_G[order_G], segments.arena_G[order_G], count_G[order_G]
        start_G = np.cumsum(height_G) - height_G
        num_tile_rows = int(height_G.sum())
        bounds = [0, *(np.flatnonzero((np.diff(arena_G) != 0) | (np.diff(height_G) != 0)) + 1).tolist(), len(order_G)]
        arenas: list[ArenaBatches] = []
        by_arena: dict[int, list[tuple[int, int]]] = {}
        for first, last in itertools.pairwise(bounds):
            by_arena.setdefault(int(arena_G[first]), []).append((first, last))
        for arena, ranges in by_arena.items():
            begin, end = ranges[0][0], ranges[-1][1]
            batches = tuple(
                Batch(start=int(start_G[first]), height=int(height_G[first]), first=first - begin, size=last - first)
                for first, last in ranges
            )
            rows = slice(int(start_G[begin]), batches[-1].rows.stop)
            own_G = order_G[begin:end]
            arenas.append(
                ArenaBatches(
                    arena=arena, segment_G=own_G, index=segments.index(own_G, plan.device), batches=batches, rows=rows
                )
            )
        offset_U = np.arange(num_tile_rows) - np.repeat(start_G, height_G)
        is_filling_U = offset_U >= np.repeat(count_G, height_G)
        source_U = np.repeat(segments.start_G[order_G], height_G) + np.minimum(
            offset_U, np.repeat(count_G - 1, height_G)
        )
        place_T = np.full(plan.num_rows, -1)
        place_T[source_U[~is_filling_U]] = np.flatnonzero(~is_filling_U)
        without_N = np.flatnonzero(place_T < 0)
        place_T[without_N] = num_tile_rows + np.arange(len(without_N))
        source_U = np.append(source_U, without_N)
        return Batches(
            arenas=tuple(arenas),
            source_U=None if in_place else torch.from_numpy(source_U).to(plan.device),
            place_T=None if in_place else torch.from_numpy(place_T).to(plan.device),
            slot_U=torch.from_numpy(np.repeat(segments.slot_G[order_G], height_G)).to(plan.device),
            is_filling_U=torch.from_numpy(is_filling_U).to(plan.device),
        )


def order_by_expert(expert_T: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Tensor]:
    """(order_R, ends_E): row numbers by expert, otherwise in their order, each expert's part filled up with -1 to a
    multiple of `multiple` rows; int32 ends of the experts' parts."""
    expert = expert_T.cpu().numpy()
    order = np.argsort(expert, kind="stable")
    rows_E = np.bincount(expert, minlength=num_experts)
    padded_E = -(-rows_E // multiple) * multiple
    ends_E = np.cumsum(padded_E)
    padded = np.full(int(ends_E[-1]), -1)
    shift_E = (ends_E - padded_E) - (np.cumsum(rows_E) - rows_E)
    padded[np.arange(len(order)) + np.repeat(shift_E, rows_E)] = order
    return torch.from_numpy(padded).to(expert_T.device), torch.from_numpy(ends_E.astype(np.int32)).to(expert_T.device)
