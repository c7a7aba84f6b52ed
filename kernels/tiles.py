"""Segments cut into tiles of few heights, as Triton's kernels read them.

Suffixes: G segments, I tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from populace.kernels.segments import Ints, Segments


def tiles_by_height(count_G: Ints, heights: Sequence[int]) -> Iterator[tuple[int, Ints, Ints]]:
    """(height, segment_I, offset_I) for ascending heights: a segment of `count_G` rows is cut into
    tiles of the lowest height that holds it, else of the largest. A tile starts `offset_I` rows
    into its segment and never leaves it."""
    height_G = np.asarray(heights)[np.searchsorted(heights[:-1], count_G)]
    for height in heights:
        per_G = np.where(height_G == height, -(-count_G // height), 0)
        segment_I = np.repeat(np.arange(len(per_G)), per_G)
        if len(segment_I):
            yield (
                height,
                segment_I,
                (np.arange(len(segment_I)) - np.repeat(np.cumsum(per_G) - per_G, per_G)) * height,
            )


SHORT, TALL = 16, 64
"""Heights of Triton's tiles: segments of at most 16 rows, as decoding has them, don't pay for
64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaTiles:
    """One arena's segments as Triton's kernels read them. Each row of a table, int64 [I, 5], is a
    tile: its first row among all rows, its first row among the arena's, how many rows, slot, expert
    (0 for dense modules)."""

    arena: int
    num_rows: int
    whole_G5: Tensor
    """The segments themselves."""
    by_height: tuple[tuple[int, Tensor], ...]
    """(height, their tiles of that height)."""


def arena_tiles(segments: Segments, device: torch.device) -> Iterator[ArenaTiles]:
    expert_G = np.zeros_like(segments.slot_G) if segments.expert_G is None else segments.expert_G
    tables: list[tuple[int, int, Ints]] = []
    for arena in np.unique(segments.arena_G).tolist():
        mine = segments.arena_G == arena
        count_G = segments.count_G[mine]
        own_G = np.cumsum(count_G) - count_G
        whole_G5 = np.stack(
            [segments.start_G[mine], own_G, count_G, segments.slot_G[mine], expert_G[mine]], 1
        )
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
        yield ArenaTiles(
            arena=arena, num_rows=int(table[:, 2].sum()), whole_G5=whole, by_height=by_height
        )


def _move(tables: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """All in one copy. Each begins at a multiple of 16 bytes: Triton would compile its kernels anew
    for one that doesn't."""
    even = [np.concatenate([table, table[-1:]]) if len(table) % 2 else table for table in tables]
    parts = torch.split(
        torch.from_numpy(np.concatenate(even)).to(device), [len(table) for table in even]
    )
    return [part[: len(table)] for table, part in zip(tables, parts, strict=True)]
