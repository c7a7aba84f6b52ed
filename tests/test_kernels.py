"""Grouped LoRA products against plain fp64 algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from populace.kernels.lora import LoraWeights, add_lora
from populace.kernels.tiles import plan_segments


def make_weights(slots: int, experts: int, rank: int, inner: int, out: int, dtype: torch.dtype) -> LoraWeights:
    lead = (slots, experts) if experts else (slots,)
    a, b = torch.randn(*lead, rank, inner), torch.randn(*lead, out, rank)
    return LoraWeights(
        a=a, b=b, grad_a=torch.zeros_like(a), grad_b=torch.zeros_like(b), scale_S=torch.rand(slots) + 0.5
    )


def expected(y: torch.Tensor, x: torch.Tensor, weights: list[LoraWeights], rows: list[tuple[int, int, int | None]]):
    """fp64, one row at a time, by torch's own autograd: (y, dx, [(dA, dB)])."""
    x64 = x.double().requires_grad_()
    leaves = [(w.a.double().requires_grad_(), w.b.double().requires_grad_()) for w in weights]
    out = []
    for row, (arena, slot, expert) in enumerate(rows):
        value = y[row].double()
        if arena >= 0:
            where = (slot,) if expert is None else (slot, expert)
            a, b = leaves[arena][0][where], leaves[arena][1][where]
            value = value + weights[arena].scale_S[slot].double() * (b @ (a @ x64[row]))
        out.append(value)
    total = torch.stack(out)
    (total * torch.linspace(-1, 1, total.numel()).view_as(total)).sum().backward()
    return total.detach(), x64.grad, [(a.grad, b.grad) for a, b in leaves]


@pytest.mark.parametrize("backend", ["reference", "grouped"])
@pytest.mark.parametrize("experts", [0, 5])
@pytest.mark.parametrize("num_rows", [1, 7, 63, 400])
def test_values_and_gradients_match_fp64(backend: str, experts: int, num_rows: int) -> None:
    torch.manual_seed(num_rows)
    weights = [make_weights(3, experts, rank, 24, 20, torch.float32) for rank in (4, 8, 64)]
    arena = torch.randint(-1, 3, (num_rows,))
    arena[0] = 1
    slot = torch.where(arena < 0, -1, torch.randint(0, 3, (num_rows,)))
    expert = torch.randint(0, max(experts, 1), (num_rows,))
    keys = [expert.tolist() if experts else [0] * num_rows, arena.tolist(), slot.tolist()]
    order = torch.tensor(sorted(range(num_rows), key=lambda i: tuple(key[i] for key in keys)))
    arena, slot, expert = arena[order], slot[order], expert[order]
    plan = plan_segments(arena, slot, expert if experts else None)
    x, y = torch.randn(num_rows, 24), torch.randn(num_rows, 20)
    rows = list(zip(arena.tolist(), slot.tolist(), expert.tolist() if experts else [None] * num_rows, strict=True))
    want_y, want_dx, want_grads = expected(y, x, weights, rows)

    x.requires_grad_()
    got = add_lora(y.clone().requires_grad_(), x, weights, plan, backend)
    (got * torch.linspace(-1, 1, got.numel()).view_as(got)).sum().backward()
    pairs = [(got.detach(), want_y)]
    if x.grad is not None:
        pairs.append((x.grad, want_dx if want_dx is not None else torch.zeros_like(x)))
    for w, (da, db) in zip(weights, want_grads, strict=True):
        pairs += [(w.grad_a, torch.zeros_like(w.a) if da is None else da)]
        pairs += [(w.grad_b, torch.zeros_like(w.b) if db is None else db)]
    for value, want in pairs:
        torch.testing.assert_close(value.double(), want.double(), rtol=1e-4, atol=1e-4)


@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=80))
@settings(deadline=None, max_examples=100)
def test_every_row_with_an_adapter_is_in_exactly_one_segment(rows: list[tuple[int, int, int]]) -> None:
    rows = sorted((expert, arena, slot) for arena, slot, expert in rows)
    arena = torch.tensor([row[1] for row in rows])
    slot = torch.tensor([row[2] if row[1] >= 0 else -1 for row in rows])
    expert = torch.tensor([row[0] for row in rows])
    seen = []
    for segments in plan_segments(arena, slot, expert).arenas:
        numbers = torch.arange(len(rows)) if segments.rows_T is None else segments.rows_T
        start = 0
        assert segments.expert_G is not None
        groups = zip(segments.ends_G.tolist(), segments.slot_G.tolist(), segments.expert_G.tolist(), strict=True)
        for end, its_slot, its_expert in groups:
            assert end > start
            for row in numbers[start:end].tolist():
                assert rows[row] == (its_expert, segments.arena, its_slot)
                seen.append(row)
            start = end
        rows_GM, place_T = segments.padded
        flat = rows_GM.flatten()[place_T]
        assert flat.tolist() == list(range(len(numbers)))
    assert sorted(seen) == [row for row in range(len(rows)) if rows[row][1] >= 0]
