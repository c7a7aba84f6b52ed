"""Fixtures: tiny bases, engines in this process, populations in memory."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before Triton is imported: its kernels run in NumPy, on this machine.
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from populace.configs.schema import (
    AdapterSettings,
    BaseSettings,
    EvaluationSettings,
    OptimizerSettings,
    RewardSettings,
    RolloutSettings,
    RunSettings,
    SchedulerSettings,
    Settings,
    TrainSettings,
)
from populace.population.client import Population
from populace.storage.objects.cloud import MemoryStore
from populace.workers.actors.engine import ShardEngine, ShardSettings
from tests.support import tiny
from tests.support.loops import Loop, chat_of, engine_of

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Bases are registered in the user's cache, keys kept in the user's folder: tests, and the
    processes they start, use their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POPULACE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("POPULACE_KEYS", str(tmp_path_factory.mktemp("keys")))
        yield


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: tiny.build(family, root / family) for family in tiny.FAMILIES}


@pytest.fixture
def make_engine(bases: dict[str, Path]) -> Callable[..., ShardEngine]:
    def make(
        family: str = "mixtral",
        *,
        device: str = "cpu",
        backend: str = "auto",
        dtype: str = "float32",
        slots: int = 32,
        max_rows: int = 4096,
        numerics: str = "invariant",
        offload: bool = False,
        threads: int = 1,
    ) -> ShardEngine:
        train = TrainSettings(
            backend=backend, max_rows_per_pass=max_rows, numerics=numerics, kl_coefficient=0.05
        )
        settings = ShardSettings(
            base_folder=str(bases[family]),
            dtype=dtype,
            device=device,
            store_url="memory://",
            population="test",
            slots=slots,
            threads=threads,
            eos_ids=frozenset({1}),
            train=train,
            optimizer=OptimizerSettings(offload=offload),
        )
        return ShardEngine(settings, MemoryStore())

    return make


@pytest.fixture
def settings(bases: dict[str, Path]) -> Settings:
    """A population on the tiny Mixtral; small enough that a wave takes a tenth of a second."""
    return Settings(
        name="test",
        partitions=2,
        base=BaseSettings(model=str(bases["mixtral"]), dtype="float32"),
        adapter=AdapterSettings(rank=4, expert_rank=1, learning_rate=1e-2),
        rollout=RolloutSettings(samples_per_task=4, max_new_tokens=6),
        scheduler=SchedulerSettings(
            max_adapters_per_wave=4,
            events_per_update=2,
            slots=8,
            residency_bonus_s=0.0,
            evidence_bonus_s=0.0,
        ),
        evaluation=EvaluationSettings(every_waves=2, heldout_share=0.25, samples_per_task=2),
        rewards=RewardSettings(
            functions={
                name: f"tests.support.rewards:{name}"
                for name in (
                    "letters",
                    "length",
                    "constant",
                    "raising",
                    "hanging",
                    "not_a_number",
                    "dying",
                )
            }
        ),
        run=RunSettings(takeover_s=0.1, pipelined=False),
    )


@pytest.fixture
def start() -> Callable[..., Loop]:
    """A controller that owns a population, with one engine in this process for workers."""

    def start_controller(population: Population, engine: ShardEngine | None = None) -> Loop:
        population.ledger.refresh()
        population.ownership.claim(population.settings.run.takeover_s)
        return Loop(population, engine or engine_of(population), chat_of(population))

    return start_controller
