"""Grouped LoRA products of every backend against plain fp64 algebra: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from populace.kernels.batches import HEIGHTS
from populace.kernels.lora import BACKENDS
from populace.kernels.plan import order_by_expert, plan_segments
from tests.support.products import CASES, DTYPES, assert_accurate, make_case

SLOW_IN_THE_INTERPRETER = {"64 experts", "256 adapters"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["reference", "grouped"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_match_fp64(name: str, backend: str, dtype: str) -> None:
    case = make_case(**CASES[name], dtype=DTYPES[dtype])
    assert_accurate(case.run(backend), case, DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "no adapter"])
def test_triton_in_the_interpreter_matches_fp64(name: str, dtype: str) -> None:
    if name in SLOW_IN_THE_INTERPRETER and dtype == "float16":
        pytest.skip("seconds per case; float32 covers the shape")
    case = make_case(**CASES[name], dtype=DTYPES[dtype])
    assert_accurate(case.run("triton"), case, DTYPES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_added_when_the_plan_says_so(backend: str) -> None:
    case = make_case(**CASES["gate and up"], dtype=torch.float32)
    once = case.run(backend)[2:]
    for total, grad in zip(case.run(backend, accumulates=True)[2:], once, strict=True):
        torch.testing.assert_close(total, 2 * grad, rtol=1e-5, atol=1e-5, equal_nan=True)


segment_lists = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-1, 2), st.integers(0, 3), st.integers(1, 90)),
    min_size=1, max_size=25, unique_by=lambda segment: segment[:3],
)  # fmt: skip


@given(segment_lists)
@settings(deadline=None, max_examples=200)
def test_batches_hold_every_row_once_and_fill_up_with_rows_of_the_same_segment(
    segments: list,
) -> None:
    rows = [segment[:3] for segment in sorted(segments) for _ in range(segment[3])]
    expert, arena, slot = (torch.tensor(column) for column in zip(*rows, strict=True))
    plan = plan_segments(arena, torch.where(arena < 0, -1, slot), expert)
    if plan.is_empty:
        return
    batches = plan.batches
    source = torch.arange(len(rows)) if batches.source_U is None else batches.source_U
    seen = []
    for own in batches.buckets:
        for batch in own.batches:
            for number, segment in enumerate(own.segment_G[batch.members].tolist()):
                tile = slice(
                    batch.start + number * batch.height, batch.start + (number + 1) * batch.height
                )
                count = int(plan.segments.count_G[segment])
                assert batch.height == min(h for h in (*HEIGHTS.tolist(), 96) if h >= count)
                assert len({rows[row] for row in source[tile].tolist()}) == 1
                assert batches.is_padding_U[tile].tolist() == [False] * count + [True] * (
                    batch.height - count
                )
                seen += source[tile][:count].tolist()
    assert sorted(seen) == [row for row in range(len(rows)) if rows[row][1] >= 0]
    if batches.place_T is not None:
        assert all(source[place] == row for row, place in enumerate(batches.place_T.tolist()))


@given(st.lists(st.integers(0, 6), max_size=90), st.sampled_from([1, 8]))
def test_every_experts_rows_are_filled_up_to_a_multiple(experts: list[int], multiple: int) -> None:
    order, ends = order_by_expert(torch.tensor(experts, dtype=torch.int64), 7, multiple)
    assert sorted(order[order >= 0].tolist()) == list(range(len(experts)))
    start = 0
    for expert, end in enumerate(ends.tolist()):
        assert (end - start) % multiple == 0
        own = [row for row in order[start:end].tolist() if row >= 0]
        assert own == sorted(own)
        assert {experts[row] for row in own} <= {expert}
        start = end
    assert start == len(order)
