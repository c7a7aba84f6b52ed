"""Where each row goes, planned on the device: order by (expert, slot), the way back, and the tiles
that the Triton kernels run over.

Routing is known on the device alone, so nothing here asks the host, and every table has a size
that follows from shapes: what is left of it is tiles of 0 rows, at which a kernel returns at once.
The tables are those that `tests/support/tables.py` makes with NumPy, followed by such tiles.

Suffixes: T rows, K experts per token, R = T·K routed rows, E experts, G segments, I tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHORT, TALL = 16, 64
"""Heights of tiles: segments of at most 16 rows, as decoding has them, don't pay for 64."""


@dataclass(frozen=True, kw_only=True)
class RoutePlan:
    """Whose rows are whose. A table's row, int32 [4], is a tile: its first row, how many rows,
    slot, expert (0 where there are none)."""

    num_rows: int
    place_TK: Tensor
    """Where the k-th copy of each row lies."""
    row_R: Tensor
    """The row that each one is a copy of."""
    ends_E: Tensor
    """int32; where each expert's rows end."""
    experts_I4: Tensor
    """Tiles of at most `TALL` rows of one expert each, whoever's they are."""
    by_height: tuple[tuple[int, Tensor], ...]
    """(height, tiles of one adapter and one expert)."""
    whole_G4: Tensor
    """Segments: all rows of one adapter and one expert."""
    is_empty: bool
    """Whether the host knows that no row has an adapter."""
    accumulates: bool = False
    """Backward adds to the gradients that are there instead of replacing them."""


def plan_routes(
    slot_T: Tensor,
    expert_TK: Tensor | None,
    num_experts: int,
    num_slots: int,
    *,
    is_empty: bool,
    accumulates: bool = False,
) -> RoutePlan:
    """A plan of rows with their slots (int64 [T], -1 for none, below `num_slots`) and, where there
    are experts, the K of each, int64 [T, K]. Without experts rows stay where they are: those of one
    slot must lie together."""
    num_rows, top_k = (len(slot_T), 1) if expert_TK is None else expert_TK.shape
    total = num_rows * top_k
    if not total:  # no row came to a shard's experts
        return _nothing(slot_T, num_rows, top_k, num_experts, accumulates)
    # One number per (expert, slot); rows without an adapter come behind their expert's others.
    width = num_slots + 1
    lane_T = torch.where(slot_T >= 0, slot_T, num_slots)
    if expert_TK is None:
        key_R, order_R = lane_T, torch.arange(total, device=slot_T.device)
    else:
        key_R = (expert_TK * width + lane_T.unsqueeze(1)).reshape(-1)
        key_R, order_R = torch.sort(key_R, stable=True)
    place_R = torch.empty_like(order_R)
    place_R.scatter_(0, order_R, torch.arange(total, device=slot_T.device))
    expert_R = key_R // width
    ends_E = torch.searchsorted(
        expert_R, torch.arange(num_experts, device=slot_T.device), right=True
    )
    start_G, count_G, slot_G, expert_G = _segments(key_R, width, num_experts)
    capacity = len(start_G)

    starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    number_E = torch.arange(num_experts, device=slot_T.device)
    experts_I4 = _cut(
        (starts_E, ends_E - starts_E, torch.zeros_like(number_E), number_E),
        (0, TALL, total),
        total // TALL + min(num_experts, total),
    )
    segments = (start_G, count_G, slot_G, expert_G)
    # Of segments taller than SHORT there are few: that bounds their tiles.
    num_tall = min(capacity, total // (SHORT + 1))
    tables = [(SHORT, _cut(segments, (0, SHORT, SHORT), capacity))]
    if num_tall:
        tables.append((TALL, _cut(segments, (SHORT, TALL, total), total // TALL + num_tall)))
    return RoutePlan(
        num_rows=total,
        place_TK=place_R.view(num_rows, top_k),
        row_R=order_R // top_k,
        ends_E=ends_E.to(torch.int32),
        experts_I4=experts_I4,
        by_height=tuple(tables),
        whole_G4=torch.stack(segments, 1).to(torch.int32),
        is_empty=is_empty,
        accumulates=accumulates,
    )


def _nothing(
    slot_T: Tensor, num_rows: int, top_k: int, num_experts: int, accumulates: bool
) -> RoutePlan:
    none_R = slot_T.new_empty(0)
    no_tiles_I4 = slot_T.new_empty(0, 4, dtype=torch.int32)
    return RoutePlan(
        num_rows=0,
        place_TK=none_R.view(num_rows, top_k),
        row_R=none_R,
        ends_E=slot_T.new_zeros(num_experts, dtype=torch.int32),
        experts_I4=no_tiles_I4,
        by_height=(),
        whole_G4=no_tiles_I4,
        is_empty=True,
        accumulates=accumulates,
    )


def _segments(key_R: Tensor, width: int, num_experts: int) -> tuple[Tensor, ...]:
    """(first row, rows, slot, expert) of each run of equal keys, in order, and then of nothing;
    those of rows without an adapter have 0 rows."""
    total = len(key_R)
    number_R = torch.arange(total, device=key_R.device)
    is_start_R = torch.ones_like(key_R, dtype=torch.bool)
    is_start_R[1:] = key_R[1:] != key_R[:-1]
    capacity = min(total, num_experts * width)
    # Which segment each first row begins; all other rows write into one place that is cut off.
    place_R = torch.where(is_start_R, is_start_R.cumsum(0) - 1, capacity)
    start_G = torch.full((capacity + 1,), total, device=key_R.device)
    start_G = start_G.scatter_(0, place_R, number_R)[:capacity]
    ends_G = torch.cat([start_G[1:], start_G.new_full((1,), total)])
    key_G = key_R[start_G.clamp(max=total - 1)]
    slot_G, expert_G = key_G % width, key_G // width
    is_real_G = (start_G < total) & (slot_G < width - 1)
    count_G = torch.where(is_real_G, ends_G - start_G, 0)
    return start_G, count_G, slot_G, expert_G


def _cut(segments: tuple[Tensor, ...], heights: tuple[int, int, int], capacity: int) -> Tensor:
    """Tiles of the segments with more than `heights[0]` and at most `heights[2]` rows, each of at
    most `heights[1]`: int32 [capacity, 4], those of 0 rows behind."""
    start_G, count_G, slot_G, expert_G = segments
    above, height, most = heights
    is_mine_G = (count_G > above) & (count_G <= most)
    per_G = torch.where(is_mine_G, (count_G + height - 1) // height, 0)
    ends_G = per_G.cumsum(0)
    number_I = torch.arange(capacity, device=start_G.device)
    segment_I = torch.searchsorted(ends_G, number_I, right=True).clamp(max=len(start_G) - 1)
    offset_I = (number_I - (ends_G - per_G)[segment_I]) * height
    rows_I = (count_G[segment_I] - offset_I).clamp(max=height)
    rows_I = torch.where(number_I < ends_G[-1], rows_I, 0)
    columns = (start_G[segment_I] + offset_I, rows_I, slot_G[segment_I], expert_G[segment_I])
    return torch.stack(columns, 1).to(torch.int32)
