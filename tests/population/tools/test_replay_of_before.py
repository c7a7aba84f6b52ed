"""Revisions that the code before adapters had exact ranks made, on this machine and in this run,
come out bit for bit. Needs the repository's history."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from populace.configs.load import load_settings
from populace.population.client import Population
from populace.population.tools.replay import ReplayOutcome, replay
from populace.workers.step.numerics import NUMERICS_REVISION
from tests.support import tiny

ROOT = Path(__file__).parents[3]
BEFORE = "39f91ad"
"""The last commit whose slabs stored padded ranks. Goes with the next NUMERICS_REVISION."""
MADE = """
import os, sys
from dataclasses import replace
from populace.configs.load import load_settings
from populace.population.client import Population
from tests.support.loops import Loop, chat_of, engine_of
from tests.support.streams import experience

settings = load_settings(None, sys.argv[1:])
settings = replace(settings, user_ranks={"user-1": 1, "user-2": 5, "user-3": 12})
population = Population.create(settings.store, settings)
population.enqueue_many(experience(settings, num_users=4, num_tasks=4))
population.ownership.claim(0.1)
loop = Loop(population, engine_of(population), chat_of(population))
while loop.wave() is not None:
    pass
population.ownership.release()
"""


@pytest.fixture(scope="module")
def tree_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which the package and its tests of then are imported."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", BEFORE], capture_output=True)
    if archive.returncode:
        pytest.skip(f"commit {BEFORE} is not in this clone: {archive.stderr.decode()[-100:]}")
    root = tmp_path_factory.mktemp("before")
    subprocess.run(["tar", "-x", "-C", root], input=archive.stdout, check=True)
    package = root / "package/populace"
    package.mkdir(parents=True)
    for name in ("population", "workers", "kernels", "storage", "configs"):
        (package / name).symlink_to(root / name)
    (root / "package/tests").symlink_to(root / "tests")
    return root / "package"


def wide(folder: Path) -> Path:
    """A base whose widths are those of real ones, to a CPU's caches and blocks."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=384, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, intermediate_size=704, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=512, initializer_range=0.05,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_revisions_of_padded_slabs_replay_byte_for_byte(
    tree_before: Path, tmp_path: Path, dtype: str
) -> None:
    assert NUMERICS_REVISION == 2, "older revisions refuse replay by name: this test goes"
    overrides = [
        f"store={tmp_path / 'store'}", f"base.model={wide(tmp_path / 'base')}",
        f"base.dtype={dtype}", "partitions=1", "adapter.rank=4", "adapter.expert_rank=1",
        "rollout.samples_per_task=3", "rollout.max_new_tokens=6", "run.pipelined=false",
        "run.threads=1", "run.takeover_s=0.1", "scheduler.max_adapters_per_wave=4",
        "scheduler.slots=8", "evaluation.heldout_share=0", "evaluation.every_waves=1000",
        "rewards.functions.letters=tests.support.rewards:letters",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tree_before), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, "-c", MADE, *overrides],
        cwd=tree_before, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    settings = load_settings(None, [*overrides, "train.backend=grouped"])
    population = Population.open(settings.store, settings)
    population.ledger.follow()
    outcomes = []
    for number in range(4):
        adapter = population.ledger.adapter(f"user-{number}")
        assert adapter.tip >= 1 and "targets" not in adapter.spec
        outcomes += replay(population, f"user-{number}")
    assert {step.outcome for step in outcomes} == {ReplayOutcome.SAME}, outcomes
    assert len(outcomes) >= 6
