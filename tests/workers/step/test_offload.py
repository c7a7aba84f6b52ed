"""Moments in host memory, updated by DeepSpeed's CPUAdam. `make .venv/dev` compiles it; without
that the first test does, in a minute and a half."""

from __future__ import annotations

from collections.abc import Callable

import torch

from populace.workers.actors.engine import ShardEngine
from populace.workers.batch import AdapterRef, WaveBatch
from tests.workers.step.test_train import admit, batch_of, spec_of, tensors

Make = Callable[..., ShardEngine]
USER = 3
TOLERANCE = 1e-5


def train(engine: ShardEngine, numbers: list[int], turns: int = 3) -> ShardEngine:
    keys = admit(engine, numbers)
    for turn in range(turns):
        wave = WaveBatch(
            adapters=tuple(batch_of(n, key, turn) for n, key in zip(numbers, keys, strict=True))
        )
        assert {update.status for update in engine.train_wave(wave).updates} == {"updated"}
    return engine


def test_cpuadam_agrees_with_the_slab_optimizer_within_1e_5(make_engine: Make) -> None:
    numbers = list(range(4))
    plain, offloaded = train(make_engine(), numbers), train(make_engine(offload=True), numbers)
    assert offloaded.describe()[1]["optimizer"].startswith("deepspeed-")
    for key in plain.slab.slots:
        for (name, value), other in zip(
            tensors(plain, key).items(), tensors(offloaded, key).values(), strict=True
        ):
            if name[0] == "grad":  # the slab's optimizer leaves it clipped
                continue
            gap = torch.linalg.vector_norm(value - other)
            assert gap <= TOLERANCE * torch.linalg.vector_norm(value), (key, name, float(gap))


def test_cpuadam_depends_neither_on_mates_nor_on_a_restart(make_engine: Make) -> None:
    alone = train(make_engine(offload=True, slots=1), [USER])
    (key,) = alone.slab.slots
    kept = tensors(alone, key)
    among = train(make_engine(offload=True), [0, 1, 2, USER, 4])
    assert all(torch.equal(value, kept[name]) for name, value in tensors(among, key).items())

    first = make_engine(offload=True)
    admit(first, [USER])
    (update,) = first.train_wave(WaveBatch(adapters=(batch_of(USER, key, 0),))).updates
    again = make_engine(offload=True)
    again.page_in([AdapterRef(key=key, spec=spec_of(USER), seed=USER)], True)
    again.slab.load(key, update.weights, update.moments, update.experts)
    for turn in (1, 2):
        again.train_wave(WaveBatch(adapters=(batch_of(USER, key, turn),)))
    after = tensors(again, key)
    assert all(torch.equal(value, after[name]) for name, value in kept.items())
