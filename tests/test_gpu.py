"""The Triton kernels compiled and run, on a real GPU. `make test-gpu`; needs torch, Triton and pytest, no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from populace.kernels import triton_lora
from populace.kernels.lora import lora_product
from populace.kernels.tiles import plan_segments
from tests.test_kernels import CASES, DTYPES, Case, assert_accurate, fill, make_case, random_counts

pytestmark = pytest.mark.gpu

BIG = {
    "dense": dict(
        counts=random_counts(4, 60, 4, 16, 0, 150), ranks=[4, 16, 36, 128], slots=16, experts=0, inner=512, out=768
    ),
    "experts": dict(
        counts=random_counts(5, 250, 2, 8, 16, 40), ranks=[4, 16], slots=8, experts=16, inner=256, out=384,
        num_modules=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["triton", "grouped"])
@pytest.mark.parametrize("name", [*CASES, *BIG])
def test_values_and_gradients_match_fp64(name: str, backend: str, dtype: str) -> None:
    case = make_case(**(CASES | BIG)[name], dtype=DTYPES[dtype])
    got = case.to("cuda").run(backend)
    assert_accurate([value.cpu() for value in got], case, DTYPES[dtype])


@pytest.mark.parametrize("backend", ["triton", "grouped"])
def test_gradients_are_added_when_the_plan_says_so(backend: str) -> None:
    case = make_case(**BIG["experts"], dtype=torch.float32).to("cuda")
    once = case.run(backend)[2:]
    for total, grad in zip(case.run(backend, accumulates=True)[2:], once, strict=True):
        torch.testing.assert_close(total, 2 * grad, rtol=1e-5, atol=1e-5, equal_nan=True)


def run_rows(case: Case, row_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """What these rows get, in this order, and the gradients that they give: deltas and gradients alone, added into
    values that are there."""
    expert_R = case.expert[row_R] if case.has_experts else None
    plan = plan_segments(case.arena[row_R], case.slot[row_R], expert_R)
    fill(case, torch.nan)
    x, y, dy = case.x[row_R], case.dy[row_R], case.dy[row_R]
    dx = x.clone()
    shrunk = triton_lora.add_deltas(y, x, case.modules, plan)
    triton_lora.add_gradients(dx, dy, x, shrunk, case.modules, plan)
    return y, dx, [grad.clone() for module in case.modules for w in module for grad in (w.grad_a, w.grad_b)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BIG)
def test_a_segments_bits_are_its_own(name: str, dtype: str) -> None:
    case = make_case(**BIG[name], dtype=DTYPES[dtype]).to("cuda")
    everyone = torch.arange(len(case.x), device="cuda")
    y, dx, grads = run_rows(case, everyone)
    again_y, again_dx, _ = run_rows(case, everyone)
    assert torch.equal(again_y, y) and torch.equal(again_dx, dx), "two runs differ"
    key = (case.expert * 1000 + case.arena) * 1000 + case.slot
    random = np.random.default_rng(0)
    for share in (0.02, 0.3, 1.0):
        chosen = [k for k in key.unique().tolist() if random.random() < share]
        random.shuffle(chosen)
        row_R = torch.cat([(key == k).nonzero().squeeze(1) for k in chosen])
        own_y, own_dx, own_grads = run_rows(case, row_R)
        assert torch.equal(own_y, y[row_R]), "forward depends on who else is there"
        assert torch.equal(own_dx, dx[row_R]), "dX depends on who else is there"
        for own, grad in zip(own_grads, grads, strict=True):
            assert torch.equal(own[~own.isnan()], grad[~own.isnan()]), "dA or dB depends on who else is there"


def test_a_pass_that_needs_no_gradient_and_has_no_adapter_is_the_base_alone() -> None:
    case = make_case(**CASES["no adapter"], dtype=torch.bfloat16).to("cuda")
    plan = plan_segments(case.arena, case.slot)
    assert torch.equal(lora_product(case.x, case.base, case.modules, plan, "triton"), case.base.forward(case.x))
