"""The device's plan against the host's: the same tables, from whatever routing."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from populace.kernels.route import SHORT, TALL, plan_routes
from tests.support.tables import order_of, segments_of, tiles_of

SLOTS = 5


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Experts [T, K], slots [T] and how many experts there are. Few of each, so that some segments
    are long and others empty."""
    num_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(num_experts, 3)))
    num_rows = draw(st.integers(0, 200))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [random.permutation(num_experts)[:top_k] for _ in range(num_rows)]
    expert_TK = np.array(rows, np.int64).reshape(num_rows, top_k)
    crowd = random.integers(-1, SLOTS, draw(st.integers(1, 4)))
    return expert_TK, random.choice(crowd, num_rows), num_experts


def assert_table(got: torch.Tensor, expected: np.ndarray) -> None:
    """`expected`, then tiles of 0 rows."""
    rows = got.tolist()
    assert [row for row in rows if row[1] > 0] == expected.tolist()
    assert len(rows) >= len(expected)


@given(routings())
@settings(deadline=None, max_examples=200)
def test_a_plan_has_the_tables_that_the_host_makes(
    routing: tuple[np.ndarray, np.ndarray, int],
) -> None:
    expert_TK, slot_T, num_experts = routing
    top_k = expert_TK.shape[1]
    plan = plan_routes(
        torch.from_numpy(slot_T), torch.from_numpy(expert_TK), num_experts, SLOTS, is_empty=False
    )
    order_R = order_of(expert_TK, slot_T, SLOTS)
    expert_R, slot_R = expert_TK.reshape(-1)[order_R], slot_T[order_R // top_k]
    assert plan.row_R.tolist() == (order_R // top_k).tolist()
    assert plan.place_TK.reshape(-1)[torch.from_numpy(order_R)].tolist() == list(
        range(plan.num_rows)
    )
    ends_E = np.bincount(expert_R, minlength=num_experts).cumsum()
    assert plan.ends_E.tolist() == ends_E.tolist()
    segment_G4 = segments_of(expert_R, slot_R)
    assert_table(plan.whole_G4, segment_G4)
    found, expected = dict(plan.by_height), tiles_of(segment_G4)
    for height in (SHORT, TALL):
        assert_table(found.get(height, torch.empty(0, 4)), expected[height])
    by_expert = segments_of(expert_R, np.zeros_like(slot_R))
    assert_table(plan.experts_I4, tiles_of(by_expert, (TALL,))[TALL])


@given(st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 150)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=100)
def test_without_experts_rows_stay_where_they_are(runs: list[tuple[int, int]]) -> None:
    # Rows of one slot lie together, those without one behind.
    by_slot = sorted(dict(runs).items(), key=lambda run: run[0] if run[0] >= 0 else SLOTS)
    slot_T = np.concatenate([np.full(count, slot) for slot, count in by_slot])
    plan = plan_routes(torch.from_numpy(slot_T), None, 1, SLOTS, is_empty=False)
    assert plan.row_R.tolist() == list(range(len(slot_T)))
    segment_G4 = segments_of(np.zeros_like(slot_T), slot_T)
    assert_table(plan.whole_G4, segment_G4)
    for height, tile_I4 in plan.by_height:
        assert_table(tile_I4, tiles_of(segment_G4)[height])


def test_a_table_has_a_size_that_follows_from_shapes_alone() -> None:
    """What a CUDA graph needs: other routing, the same shapes."""
    shapes = set()
    for seed in range(20):
        random = np.random.default_rng(seed)
        expert_TK = np.stack([random.permutation(6)[:2] for _ in range(70)])
        slot_T = random.integers(-1, SLOTS, 70)
        plan = plan_routes(
            torch.from_numpy(slot_T), torch.from_numpy(expert_TK), 6, SLOTS, is_empty=False
        )
        tables = [plan.experts_I4, plan.whole_G4, *(table for _, table in plan.by_height)]
        shapes.add(tuple(table.shape for table in tables))
    assert len(shapes) == 1
