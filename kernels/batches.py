"""Segments put together into batched products, for `grouped.py`.

Suffixes: T rows, G segments, U tile rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from populace.kernels.segments import Ints, Segments

HEIGHTS = np.array([1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64])
"""Segments of at most 64 rows are padded to the next of these, so that many become one batched
product. 5 to 7 and 9 to 11 are missing: MKL splits a lone product of so many rows over threads,
with other bits."""

LARGE_STEP = 32
"""Longer segments of experts are padded to multiples of this; longer dense ones, which mostly
lie right as they are, not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentBatch:
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
    batches: tuple[SegmentBatch, ...]
    rows: slice
    """Tile rows of this arena."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Segments put together into batched products. How a segment is padded depends on its own
    length alone."""

    arenas: tuple[ArenaBatches, ...]
    source_U: Tensor | None
    """The row that each tile row is a copy of: what fills a segment up copies its own last row.
    Behind all tiles come the rows without an adapter. None: the rows as they are."""
    place_T: Tensor | None
    """The tile row of each row."""
    slot_U: Tensor
    is_padding_U: Tensor

    @staticmethod
    def of(segments: Segments, num_rows: int) -> Batches:
        """`num_rows`: of the whole pass."""
        count_G, height_G = segments.count_G, _heights(segments)

        # Rows that lie batch by batch already, and need no padding, are used where they are.
        is_whole = int(count_G.sum()) == num_rows and bool((height_G == count_G).all())
        in_place = is_whole and bool((np.diff(segments.arena_G) >= 0).all())
        order_G = np.arange(len(count_G)) if in_place else np.lexsort((height_G, segments.arena_G))
        height_G, count_G = height_G[order_G], count_G[order_G]
        start_G = np.cumsum(height_G) - height_G
        num_tile_rows = int(height_G.sum())

        # Each tile row copies a row of its segment: the one at its offset, or the last as padding.
        offset_U = np.arange(num_tile_rows) - np.repeat(start_G, height_G)
        is_padding_U = offset_U >= np.repeat(count_G, height_G)
        within_U = np.minimum(offset_U, np.repeat(count_G - 1, height_G))
        source_U = np.repeat(segments.start_G[order_G], height_G) + within_U

        # The way back; rows without an adapter come behind all tiles.
        place_T = np.full(num_rows, -1)
        place_T[source_U[~is_padding_U]] = np.flatnonzero(~is_padding_U)
        without_N = np.flatnonzero(place_T < 0)
        place_T[without_N] = num_tile_rows + np.arange(len(without_N))
        source_U = np.append(source_U, without_N)
        return Batches(
            arenas=tuple(_arenas(segments, order_G, start_G, height_G)),
            source_U=None if in_place else torch.from_numpy(source_U),
            place_T=None if in_place else torch.from_numpy(place_T),
            slot_U=torch.from_numpy(np.repeat(segments.slot_G[order_G], height_G)),
            is_padding_U=torch.from_numpy(is_padding_U),
        )


def _heights(segments: Segments) -> Ints:
    """[G] the height that each segment is padded to."""
    step = 1 if segments.expert_G is None else LARGE_STEP
    large_G = -(-segments.count_G // step) * step
    small_G = HEIGHTS[np.searchsorted(HEIGHTS, np.minimum(segments.count_G, HEIGHTS[-1]))]
    height_G: Ints = np.where(segments.count_G > HEIGHTS[-1], large_G, small_G)
    return height_G


def _arenas(
    segments: Segments, order_G: Ints, start_G: Ints, height_G: Ints
) -> Iterator[ArenaBatches]:
    """Runs of segments of one arena and height; `start_G` and `height_G` are in `order_G`."""
    arena_G = segments.arena_G[order_G]
    is_new_G = (np.diff(arena_G) != 0) | (np.diff(height_G) != 0)
    bounds = [0, *(np.flatnonzero(is_new_G) + 1).tolist(), len(order_G)]
    by_arena: dict[int, list[tuple[int, int]]] = {}
    for first, last in itertools.pairwise(bounds):
        by_arena.setdefault(int(arena_G[first]), []).append((first, last))
    for arena, ranges in by_arena.items():
        begin, end = ranges[0][0], ranges[-1][1]
        batches = tuple(
            SegmentBatch(
                start=int(start_G[first]),
                height=int(height_G[first]),
                first=first - begin,
                size=last - first,
            )
            for first, last in ranges
        )
        own_G = order_G[begin:end]
        yield ArenaBatches(
            arena=arena,
            segment_G=own_G,
            index=segments.index(own_G),
            batches=batches,
            rows=slice(int(start_G[begin]), batches[-1].rows.stop),
        )
