"""Kernels compiled and run on a real GPU: `make test-gpu`. Needs torch, Triton, NumPy and pytest,
no more."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import triton

from populace.kernels import triton_lora
from tests.support.products import (
    CASES,
    DTYPES,
    Case,
    SlotsOf,
    assert_accurate,
    make_case,
    random_counts,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compiled() -> None:
    assert not triton.knobs.runtime.interpret, (
        "these tests are about compiled kernels: make test-gpu"
    )


BIG = {
    "dense": dict(
        counts=random_counts(4, 60, 4, 16, 0, 150),
        ranks=[4, 16, 36, 128],
        slots=16,
        experts=0,
        inner=512,
        out=768,
    ),
    "experts": dict(
        counts=random_counts(5, 250, 2, 8, 16, 40),
        ranks=[4, 16],
        slots=8,
        experts=16,
        inner=256,
        out=384,
        num_modules=2,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*CASES, *BIG])
def test_values_and_gradients_match_fp64(name: str, dtype: str) -> None:
    case = make_case(**(CASES | BIG)[name], dtype=DTYPES[dtype])
    got = case.to("cuda").run("triton")
    assert_accurate([value.cpu() for value in got], case, DTYPES[dtype])


def test_gradients_are_added_when_the_plan_says_so() -> None:
    case = make_case(**BIG["experts"], dtype=torch.float32).to("cuda")
    once = case.run("triton")[2:]
    for total, grad in zip(case.run("triton", accumulates=True)[2:], once, strict=True):
        torch.testing.assert_close(total, 2 * grad, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", BIG)
def test_a_plan_is_the_one_that_a_cpu_makes_and_asks_nothing(name: str) -> None:
    case = make_case(**BIG[name], dtype=torch.float32)
    there = case.to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = there.routes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = case.routes()
    heights = zip(plan.by_height, expected.by_height, strict=True)
    pairs = [(table, twin) for (_, table), (_, twin) in heights]
    for name in ("place_TK", "row_R", "ends_E", "experts_I4", "whole_G4"):
        pairs.append((getattr(plan, name), getattr(expected, name)))
    # What stands behind the tiles is nobody's.
    for got, want in pairs:
        got = got.cpu()
        if want.shape[-1:] == (4,):
            got, want = got[got[:, 1] > 0], want[want[:, 1] > 0]
        assert torch.equal(got, want)


def run_rows(
    case: Case, row_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """What Triton adds for these rows to a y (here: dy) and a dX (here: x) that are there, and the
    gradients of every module and arena, NaN where none is."""
    rows = dataclasses.replace(
        case,
        **{name: getattr(case, name)[row_R] for name in ("arena", "slot", "expert", "x", "dy")},
    )
    for module in rows.modules:
        for w in module:
            w.grad_a.fill_(torch.nan)
            w.grad_b.fill_(torch.nan)
    plan, slots = rows.routes(), SlotsOf(rows.modules)
    x, y, dy = (own[plan.row_R] for own in (rows.x, rows.dy, rows.dy))
    dx = x.clone()
    shrunk = triton_lora.add_deltas(y, x, slots.pointers, plan)
    triton_lora.add_gradients(dx, dy, x, shrunk, slots.pointers, plan)
    place = plan.place_TK.squeeze(1)
    return y[place], dx[place], [grad for own in slots.grads() for pair in own for grad in pair]


def only(case: Case, grads: list[torch.Tensor], row_R: torch.Tensor) -> list[torch.Tensor]:
    """`grads` of the adapters (and experts) of these rows; NaN elsewhere."""
    kept, places = [], iter(grads)
    for module in case.modules:
        for arena in range(len(module)):
            mine_R = row_R[case.arena[row_R] == arena]
            where = (
                (case.slot[mine_R], case.expert[mine_R])
                if case.has_experts
                else (case.slot[mine_R],)
            )
            for grad in (next(places), next(places)):
                kept.append(torch.full_like(grad, torch.nan))
                kept[-1][where] = grad[where]
    return kept


def assert_same_bits(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BIG)
def test_a_segments_bits_are_its_own(name: str, dtype: str) -> None:
    case = make_case(**BIG[name], dtype=DTYPES[dtype]).to("cuda")
    everyone = torch.arange(len(case.x), device="cuda")
    y, dx, grads = run_rows(case, everyone)
    again_y, again_dx, again_grads = run_rows(case, everyone)
    assert_same_bits([again_y, again_dx, *again_grads], [y, dx, *grads])

    key = (case.expert * 1000 + case.arena) * 1000 + case.slot
    random = np.random.default_rng(0)
    for share in (0.02, 0.3, 1.0):
        chosen = [k for k in key[case.arena >= 0].unique().tolist() if random.random() < share]
        random.shuffle(chosen)
        row_R = torch.cat([(key == k).nonzero().squeeze(1) for k in chosen])
        own_y, own_dx, own_grads = run_rows(case, row_R)
        assert_same_bits(
            [own_y, own_dx, *own_grads], [y[row_R], dx[row_R], *only(case, grads, row_R)]
        )
