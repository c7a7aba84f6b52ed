"""One fused step for many adapters gives each what it would get alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from populace.workers.actors.engine import ShardEngine
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    AdapterRef,
    ExperienceKind,
    Sample,
    ScoredSample,
    TrainGroup,
    WaveBatch,
)
from populace.workers.shapes import AdapterSpec
from tests.support import tiny

Make = Callable[..., ShardEngine]
RANKS = (1, 4, 8, 16)
TARGETS = {3: "attention", 4: "experts"}
"""Of a number modulo 7; both where it isn't here."""
TENSOR_TOLERANCE = 1e-5


def spec_of(number: int) -> AdapterSpec:
    return AdapterSpec(
        rank=RANKS[number % 4],
        expert_rank=1 + number % 3,
        alpha=32,
        learning_rate=1e-3 * (1 + number),
        targets=TARGETS.get(number % 7, "both"),
    )


def batch_of(number: int, key: AdapterKey, turn: int, reward_scale: float = 1.0) -> AdapterBatch:
    """Groups of one adapter: they depend on its number and the turn alone."""
    random = np.random.default_rng([number, turn])

    def tokens(low: int, high: int) -> np.ndarray:
        return random.integers(2, tiny.VOCABULARY, random.integers(low, high)).astype(np.int32)

    def scored() -> ScoredSample:
        ids = tokens(3, 9)
        return ScoredSample(
            sample=Sample(
                completion_ids=ids,
                logprobs=(-5 - random.random(len(ids))).astype(np.float32),
                expert_ids=None,
                finished=True,
            ),
            reward=float(random.random() * reward_scale),
            base_logprobs=(-5 - random.random(len(ids))).astype(np.float32),
        )

    kinds = (("task", 4), ("task", 3), ("trajectory", 1), ("demonstration", 1))
    return AdapterBatch(
        adapter=key,
        groups=tuple(
            TrainGroup(
                event_id=f"{turn}-{place}",
                kind=kind,
                prompt_ids=tokens(4, 12),
                prompt_expert_ids=None,
                samples=tuple(scored() for _ in range(num_samples)),
            )
            for place, (kind, num_samples) in enumerate(kinds)
        ),
    )


def admit(engine: ShardEngine, numbers: list[int]) -> list[AdapterKey]:
    """Adapters with a non-zero B: with zero, half of the gradients would vanish."""
    keys = [AdapterKey(f"user-{number}", 0) for number in numbers]
    engine.page_in(
        [
            AdapterRef(key=key, spec=spec_of(n), seed=n)
            for key, n in zip(keys, numbers, strict=True)
        ],
        True,
    )
    for key, number in zip(keys, numbers, strict=True):
        exact = engine.slab.exact_layout(spec_of(number))
        values = np.random.default_rng(number).normal(0, 0.05, exact.size).astype(np.float32)
        engine.slab.load(key, values.tobytes(), None, tuple(range(engine.base.dims.num_experts)))
    return keys


def tensors(engine: ShardEngine, key: AdapterKey) -> dict[tuple[str, str, int, str], torch.Tensor]:
    """Every gradient, weight and moment tensor of an adapter, by name."""
    slab, slot = engine.slab, engine.slab.slots[key]
    exact = slab.exact_layout(slot.spec)
    names = {"grad": "grads", "weight": "weights", "m": "m", "v": "v"}
    return {
        (name, *where): exact.view(slab.memory.part(slot.address, part), *where).clone()
        for name, part in names.items()
        for where in (*exact.dense, *exact.expert)
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_a_mixed_rank_wave_gives_each_adapter_the_update_it_gets_alone(
    make_engine: Make, family: str, backend: str
) -> None:
    numbers = list(range(16))
    together = make_engine(family, backend=backend)
    keys = admit(together, numbers)
    apart = []
    for number in numbers:
        engine = make_engine(family, backend=backend, slots=1)
        admit(engine, [number])
        apart.append(engine)
    for turn in range(3):
        result = together.train_wave(
            WaveBatch(
                adapters=tuple(batch_of(n, key, turn) for n, key in zip(numbers, keys, strict=True))
            )
        )
        assert [update.status for update in result.updates] == ["updated"] * 16
        for number, key, engine in zip(numbers, keys, apart, strict=True):
            engine.train_wave(WaveBatch(adapters=(batch_of(number, key, turn),)))
            alone = tensors(engine, key)
            for name, value in tensors(together, key).items():
                gap = torch.linalg.vector_norm(value - alone[name])
                size = torch.linalg.vector_norm(alone[name])
                assert gap <= TENSOR_TOLERANCE * size, (turn, key, name, float(gap / size))
    moved = tensors(together, keys[0])
    assert all(moved["v", *where].any() for where in together.slab.exact_layout(spec_of(0)).dense)


def test_an_adapter_split_over_passes_gets_the_same_update(make_engine: Make) -> None:
    whole, split = make_engine(), make_engine(max_rows=40)
    for engine in (whole, split):
        keys = admit(engine, [0, 1, 2])
        engine.train_wave(
            WaveBatch(adapters=tuple(batch_of(n, key, 0) for n, key in enumerate(keys)))
        )
    for key in keys:
        one, other = tensors(whole, key), tensors(split, key)
        for name in one:
            gap = torch.linalg.vector_norm(one[name] - other[name])
            assert gap <= TENSOR_TOLERANCE * torch.linalg.vector_norm(one[name]), name


def test_slots_outside_the_wave_stay_bitwise_the_same(make_engine: Make) -> None:
    engine = make_engine()
    keys = admit(engine, list(range(8)))
    before = {key: tensors(engine, key) for key in keys[4:]}
    engine.train_wave(WaveBatch(adapters=tuple(batch_of(n, keys[n], 0) for n in range(4))))
    for key, kept in before.items():
        assert all(torch.equal(value, kept[name]) for name, value in tensors(engine, key).items())


def test_a_non_finite_adapter_is_skipped_whole_and_its_neighbours_go_on(make_engine: Make) -> None:
    engine = make_engine()
    keys = admit(engine, [0, 1, 2])
    broken = engine.slab.slots[keys[1]]
    layout = engine.slab.memory.layout(broken.address)
    weights_P = engine.slab.memory.part(broken.address, "weights")
    layout.view(weights_P, "q_proj", 1, "b")[0, 0] = torch.inf
    before = {name: value for name, value in tensors(engine, keys[1]).items() if name[0] != "grad"}
    state = (broken.state.step, broken.state.baseline)
    result = engine.train_wave(
        WaveBatch(adapters=tuple(batch_of(n, key, 0) for n, key in enumerate(keys)))
    )
    assert [update.status for update in result.updates] == ["updated", "non_finite", "updated"]
    after = tensors(engine, keys[1])
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert (broken.state.step, broken.state.baseline) == state


def test_no_signal_changes_nothing(make_engine: Make) -> None:
    engine = make_engine()
    (key,) = admit(engine, [0])
    batch = batch_of(0, key, 0, reward_scale=0.0)
    flat = AdapterBatch(adapter=key, groups=batch.groups[:2])
    before = tensors(engine, key)
    (update,) = engine.train_wave(WaveBatch(adapters=(flat,))).updates
    assert (update.status, update.weights) == ("no_signal", b"")
    assert all(torch.equal(value, before[name]) for name, value in tensors(engine, key).items())


def test_blobs_bring_back_weights_moments_and_state_bitwise(make_engine: Make) -> None:
    engine = make_engine()
    (key,) = admit(engine, [5])
    (update,) = engine.train_wave(WaveBatch(adapters=(batch_of(5, key, 0),))).updates
    kept, state = tensors(engine, key), engine.slab.slots[key].state
    other = make_engine()
    other.page_in([AdapterRef(key=key, spec=spec_of(5), seed=5)], True)
    other.slab.load(key, update.weights, update.moments, update.experts)
    again = tensors(other, key)
    assert all(torch.equal(value, again[name]) for name, value in kept.items() if name[0] != "grad")
    assert other.slab.slots[key].state == state


def test_experts_that_no_token_reached_store_no_bytes(make_engine: Make) -> None:
    engine = make_engine()
    key = AdapterKey("one", 0)
    engine.page_in([AdapterRef(key=key, spec=spec_of(1), seed=1)], True)
    ids = np.zeros((1, 2, 2), np.int16)
    ids[..., 1] = 2  # always experts 0 and 2
    group = batch_of(1, key, 0).groups[0]
    routed = TrainGroup(
        event_id=group.event_id,
        kind=ExperienceKind.TASK,
        prompt_ids=group.prompt_ids,
        prompt_expert_ids=ids.repeat(len(group.prompt_ids), 0),
        samples=tuple(
            ScoredSample(
                sample=Sample(
                    completion_ids=scored.sample.completion_ids,
                    logprobs=scored.sample.logprobs,
                    expert_ids=ids.repeat(len(scored.sample.completion_ids) - 1, 0),
                    finished=True,
                ),
                reward=scored.reward,
                base_logprobs=scored.base_logprobs,
            )
            for scored in group.samples
        ),
    )
    (update,) = engine.train_wave(
        WaveBatch(adapters=(AdapterBatch(adapter=key, groups=(routed,)),))
    ).updates
    layout = engine.slab.exact_layout(spec_of(1))
    assert update.experts == (0, 2)
    assert len(update.weights) == 4 * (layout.dense_size + 2 * layout.expert_size)


def test_the_learning_rate_of_b_can_differ(make_engine: Make) -> None:
    moved = {}
    for ratio in (1.0, 4.0):
        engine, key = make_engine(), AdapterKey("one", 0)
        spec = AdapterSpec(
            rank=4, expert_rank=1, alpha=32, learning_rate=1e-3, b_learning_rate_ratio=ratio
        )
        engine.page_in([AdapterRef(key=key, spec=spec, seed=1)], True)
        before = tensors(engine, key)
        engine.train_wave(WaveBatch(adapters=(batch_of(1, key, 0),)))
        after = tensors(engine, key)
        moved[ratio] = (
            (after["weight", "q_proj", 0, "b"] - before["weight", "q_proj", 0, "b"]).abs().max()
        )
    # Adam's first step has the size of the learning rate.
    assert float(moved[4.0]) == pytest.approx(4 * float(moved[1.0]), rel=1e-3)
