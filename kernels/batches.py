"""Segments put together into batched products, for `grouped.py`.

Suffixes: T rows, G segments of a bucket, H those of an arena, U tile rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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
    """Segments of one bucket and one height."""

    start: int
    """First of its rows among all tile rows."""
    height: int
    first: int
    """First of its segments among the bucket's."""
    size: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.size * self.height)

    @property
    def members(self) -> slice:
        return slice(self.first, self.first + self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaShare:
    """What one arena has of a bucket's segments."""

    arena: int
    place_H: Ints
    """Their places among the bucket's."""
    index: slice | tuple[Tensor, ...]
    """Which of the arena's tensors they use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketBatches:
    """The segments of arenas whose ranks are padded alike, and whose tensors share memory, batch by
    batch."""

    segment_G: Ints
    arena_G: Ints
    slot_G: Ints
    expert_G: Ints | None
    shares: tuple[ArenaShare, ...]
    batches: tuple[SegmentBatch, ...]
    rows: slice
    """Tile rows of this bucket."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Segments put together into batched products. How a segment is padded depends on its own
    length alone."""

    buckets: tuple[BucketBatches, ...]
    source_U: Tensor | None
    """The row that each tile row is a copy of: what fills a segment up copies its own last row.
    Behind all tiles come the rows without an adapter. None: the rows as they are."""
    place_T: Tensor | None
    """The tile row of each row."""
    slot_U: Tensor
    is_padding_U: Tensor

    @staticmethod
    def of(segments: Segments, num_rows: int, buckets: Sequence[int] | None = None) -> Batches:
        """`num_rows`: of the whole pass. `buckets`: of each arena; without, each has its own."""
        count_G, height_G = segments.count_G, _heights(segments)
        arena_G = segments.arena_G
        bucket_G = arena_G if buckets is None else np.asarray(buckets)[arena_G]

        # Rows that lie batch by batch already, and need no padding, are used where they are.
        is_whole = int(count_G.sum()) == num_rows and bool((height_G == count_G).all())
        num_runs = 1 + int((np.diff(bucket_G) != 0).sum())
        in_place = is_whole and num_runs == len(np.unique(bucket_G))
        order_G = np.arange(len(count_G)) if in_place else np.lexsort((height_G, bucket_G))
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
            buckets=tuple(_buckets(segments, bucket_G, order_G, start_G, height_G)),
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


def _buckets(
    segments: Segments, bucket_G: Ints, order_G: Ints, start_G: Ints, height_G: Ints
) -> Iterator[BucketBatches]:
    """Runs of segments of one bucket and height; `start_G` and `height_G` are in `order_G`."""
    bucket_G = bucket_G[order_G]
    is_new_G = (np.diff(bucket_G) != 0) | (np.diff(height_G) != 0)
    bounds = [0, *(np.flatnonzero(is_new_G) + 1).tolist(), len(order_G)]
    by_bucket: dict[int, list[tuple[int, int]]] = {}
    for first, last in itertools.pairwise(bounds):
        by_bucket.setdefault(int(bucket_G[first]), []).append((first, last))
    for ranges in by_bucket.values():
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
        arena_G = segments.arena_G[own_G]
        yield BucketBatches(
            segment_G=own_G,
            arena_G=arena_G,
            slot_G=segments.slot_G[own_G],
            expert_G=None if segments.expert_G is None else segments.expert_G[own_G],
            shares=tuple(
                ArenaShare(arena=arena, place_H=place_H, index=segments.index(own_G[place_H]))
                for arena in np.unique(arena_G).tolist()
                for place_H in [np.flatnonzero(arena_G == arena)]
            ),
            batches=batches,
            rows=slice(int(start_G[begin]), batches[-1].rows.stop),
        )
