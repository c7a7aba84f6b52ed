"""A user's new bytes are the same bits whoever shares the batch, wherever its slot lies, with one
thread or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from populace.kernels import grouped
from populace.kernels.lora import FrozenProduct
from populace.workers.actors.engine import ShardEngine
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    AdapterUpdate,
    ExperienceKind,
    Sample,
    ScoredSample,
    TrainGroup,
    WaveBatch,
)
from populace.workers.step.numerics import probe_invariance
from tests.workers.step.test_rollout import request
from tests.workers.step.test_train import admit, batch_of

Make = Callable[..., ShardEngine]
TURNS = 2
USER = 5


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def train(engine: ShardEngine, numbers: list[int]) -> list[AdapterUpdate]:
    """The updates that `USER` gets, turn by turn, in a wave of the adapters `numbers`, in that
    order."""
    keys = dict(zip(numbers, admit(engine, numbers), strict=True))
    found = []
    for turn in range(TURNS):
        wave = WaveBatch(
            adapters=tuple(batch_of(number, key, turn) for number, key in keys.items())
        )
        found += [
            update for update in engine.train_wave(wave).updates if update.adapter == keys[USER]
        ]
    return found


def assert_same(got: list[AdapterUpdate], expected: list[AdapterUpdate]) -> None:
    for turn, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.status == other.status == "updated"
        assert one.experts == other.experts
        for part in ("weights", "moments"):
            left, right = (
                np.frombuffer(getattr(update, part), np.uint8) for update in (one, other)
            )
            assert np.array_equal(left, right), (
                f"{part} of turn {turn}: {(left != right).mean():.1%} of bytes differ"
            )


@pytest.mark.parametrize("backend", ["grouped", "reference"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_users_new_bytes_do_not_depend_on_mates_slots_packing_or_threads(
    make_engine: Make, family: str, backend: str
) -> None:
    alone = train(make_engine(family, backend=backend, slots=1), [USER])
    for mates in (1, 15):
        numbers = list(range(mates + 1)) if mates >= USER else [2, USER]
        shuffled = np.random.default_rng(mates).permutation(numbers).tolist()
        for threads, order, max_rows in [
            (1, numbers, 4096),
            (2, shuffled, 4096),
            (2, numbers[::-1], 400),
        ]:
            engine = make_engine(
                family, backend=backend, slots=mates + 9, max_rows=max_rows, threads=threads
            )
            assert_same(train(engine, order), alone)


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_a_users_new_bytes_do_not_depend_on_255_mates(make_engine: Make, family: str) -> None:
    order = np.random.default_rng(255).permutation(256).tolist()
    crowded = train(make_engine(family, slots=264, threads=2), order)
    assert_same(crowded, train(make_engine(family, slots=1), [USER]))


def lesson(
    key: AdapterKey, number: int, num_rows: int, experts: tuple[int, int] | None
) -> AdapterBatch:
    """One sequence of `num_rows` rows, by its own routing or by two given experts."""
    ids = np.random.default_rng(number).integers(2, 300, num_rows + 1).astype(np.int32)
    routes = None if experts is None else np.tile(np.array(experts, np.int16), (num_rows, 2, 1))
    of_prompt, of_answer = (None, None) if routes is None else (routes[:4], routes[4:])
    sample = Sample(completion_ids=ids[4:], logprobs=None, expert_ids=of_answer, finished=True)
    group = TrainGroup(
        event_id="one",
        kind=ExperienceKind.DEMONSTRATION,
        prompt_ids=ids[:4],
        prompt_expert_ids=of_prompt,
        samples=(ScoredSample(sample=sample, reward=1.0, base_logprobs=None),),
    )
    return AdapterBatch(adapter=key, groups=(group,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("experts", [None, (0, 2)])
@pytest.mark.parametrize("num_rows", [5, 8, 16, 19, 64, 72, 104])
def test_rows_that_need_no_filling_up_are_computed_as_they_are_beside_others(
    make_engine: Make, num_rows: int, experts: tuple[int, int] | None, dtype: str
) -> None:
    kept = []
    for mates in ([], [(6, experts, num_rows)], [(6, (1, 3), 9), (9, None, 13)]):
        engine = make_engine(dtype=dtype)
        numbers = [USER, *(number for number, _, _ in mates)]
        keys = dict(zip(numbers, admit(engine, numbers), strict=True))
        lessons = [lesson(keys[USER], USER, num_rows, experts)]
        lessons += [lesson(keys[number], number, rows, routes) for number, routes, rows in mates]
        updates = engine.train_wave(WaveBatch(adapters=tuple(lessons))).updates
        assert {update.status for update in updates} == {"updated"}
        kept.append(updates[:1])
    for beside in kept[1:]:
        assert_same(beside, kept[0])


def test_a_users_rollouts_are_the_same_bits_whoever_is_decoded_beside_them(
    make_engine: Make,
) -> None:
    for threads in (1, 2):
        engine = make_engine(slots=64, threads=threads)
        keys = admit(engine, list(range(33)))
        requests = [request(key, num_samples=1 + int(key.pseudonym[5:]) % 4) for key in keys]
        (alone,) = engine.roll_out([requests[USER]])
        together = engine.roll_out(requests[::-1])
        (beside,) = (group for group in together if group.adapter == keys[USER])
        for one, other in zip(alone.samples, beside.samples, strict=True):
            assert one.completion_ids.tolist() == other.completion_ids.tolist()
            assert np.array_equal(one.logprobs, other.logprobs)
            assert np.array_equal(one.expert_ids, other.expert_ids)


def test_the_probe_finds_no_dependence_on_this_machine(make_engine: Make) -> None:
    for threads in (1, 2):
        engine = make_engine(threads=threads)
        assert probe_invariance(engine.base, engine.kernels) == ""
        assert engine.describe()[1]["numerics"] == "invariant"


def test_the_probe_names_a_product_whose_bits_depend_on_its_row_count(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = FrozenProduct.forward
    monkeypatch.setattr(
        FrozenProduct, "forward", lambda self, x: forward(self, x) * (1 + 1e-6 * (len(x) == 24))
    )
    engine = make_engine()
    assert "q_proj: 24 rows" in probe_invariance(engine.base, engine.kernels)
    assert engine.describe()[1]["numerics"] == "fast"


def test_the_probe_finds_adapters_that_feel_their_mates(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_deltas = grouped.add_deltas

    def leaking(y_TF: torch.Tensor, *arguments: object) -> list[torch.Tensor]:
        saved = add_deltas(y_TF, *arguments)
        y_TF += 1e-6 * y_TF.mean()
        return saved

    monkeypatch.setattr(grouped, "add_deltas", leaking)
    engine = make_engine()
    assert "mates" in probe_invariance(engine.base, engine.kernels)


def test_fast_numerics_promise_nothing(make_engine: Make) -> None:
    assert make_engine(numerics="fast").describe()[1]["numerics"] == "fast"
