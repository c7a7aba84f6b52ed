"""A user's new bytes are the same bits whoever shares the batch, wherever its slot lies, with one thread or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from populace.workers.batch import AdapterUpdate, WaveBatch
from populace.workers.engine import ShardEngine
from tests.test_fused_step import admit, batch_of
from tests.test_rollout import request

Make = Callable[..., ShardEngine]
TURNS = 2
USER = 5


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def train(engine: ShardEngine, numbers: list[int]) -> list[AdapterUpdate]:
    """The updates that `USER` gets, turn by turn, in a wave of the adapters `numbers`, in that order."""
    keys = dict(zip(numbers, admit(engine, numbers), strict=True))
    found = []
    for turn in range(TURNS):
        wave = WaveBatch(adapters=tuple(batch_of(number, key, turn) for number, key in keys.items()))
        found += [update for update in engine.train_wave(wave).updates if update.adapter == keys[USER]]
    return found


def assert_same(got: list[AdapterUpdate], expected: list[AdapterUpdate]) -> None:
    for turn, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.status == other.status == "updated"
        assert one.experts == other.experts
        for part in ("weights", "moments"):
            left, right = (np.frombuffer(getattr(update, part), np.uint8) for update in (one, other))
            assert np.array_equal(left, right), f"{part} of turn {turn}: {(left != right).mean():.1%} of bytes differ"


@pytest.mark.parametrize("backend", ["grouped", "reference"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_users_new_bytes_do_not_depend_on_mates_slots_packing_or_threads(
    make_engine: Make, family: str, backend: str
) -> None:
    alone = train(make_engine(family, backend=backend, slots=1), [USER])
    for mates in (1, 15, 255):
        if backend == "reference" and mates > 15:
            continue
        numbers = list(range(mates + 1)) if mates >= USER else [2, USER]
        shuffled = np.random.default_rng(mates).permutation(numbers).tolist()
        variants = [(1, numbers, 4096), (2, shuffled, 4096), (2, numbers[::-1], 400)]
        for threads, order, max_rows in variants[1:2] if mates == 255 else variants:
            engine = make_engine(family, backend=backend, slots=mates + 9, max_rows=max_rows, threads=threads)
            assert_same(train(engine, order), alone)


def test_a_users_rollouts_are_the_same_bits_whoever_is_decoded_beside_them(make_engine: Make) -> None:
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
