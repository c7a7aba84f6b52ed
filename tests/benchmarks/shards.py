"""What splitting a base over actors costs and saves. `make bench-shards`; correctness first, then
pairs in one run.

The step's base is a random Mixtral of 48 M parameters; loading is also measured on `smollm2-moe`
where it is prepared.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import ray

from populace.configs.schema import GroupSettings, TrainSettings
from populace.storage.objects.cloud import MemoryStore
from populace.workers.actors.engine import ShardEngine, ShardSettings, keep_freed_memory
from populace.workers.actors.group import NAMESPACE, ShardGroup
from populace.workers.base.families import dims_of
from populace.workers.base.footprint import config_of, tensors_of
from populace.workers.base.registry import find_prepared
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    AdapterRef,
    RolloutRequest,
    WaveBatch,
)
from populace.workers.shapes import AdapterSpec
from populace.workers.shards.placement import place_shards
from tests.benchmarks.figures import Figure, figure, publish
from tests.benchmarks.step import VOCABULARY, build_base
from tests.support.loading import measure
from tests.support.routing import NoisyGate, learn_from
from tests.support.waves import demonstration

matplotlib.use("Agg")
USERS, TOKENS = 32, 64
SPEC = AdapterSpec(rank=8, expert_rank=4, alpha=32, learning_rate=1e-3)
NOISES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)


def settings_for(folder: Path, store: Path, threads: int) -> ShardSettings:
    return ShardSettings(
        base_folder=str(folder), dtype="float32", store_url=str(store), population="bench",
        slots=2 * USERS,
        threads=threads, eos_ids=frozenset(),
        train=TrainSettings(kl_coefficient=0.0),
    )  # fmt: skip


KEYS = [AdapterKey(f"{number:032x}", 0) for number in range(USERS)]
REFS = [AdapterRef(key=key, spec=SPEC, seed=number) for number, key in enumerate(KEYS)]


def wave() -> WaveBatch:
    groups = [(demonstration(number, TOKENS, VOCABULARY),) for number in range(USERS)]
    return WaveBatch(
        adapters=tuple(
            AdapterBatch(adapter=key, groups=group) for key, group in zip(KEYS, groups, strict=True)
        )
    )


def requests(new_tokens: int) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            adapter=key, event_id=str(n), prompt_ids=np.arange(2 + n, 18 + n, dtype=np.int32),
            num_samples=2, max_new_tokens=new_tokens, temperature=1.0,
        )
        for n, key in enumerate(KEYS)
    ]  # fmt: skip


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def steps(folder: Path, store: Path) -> Iterator[Figure]:
    """One shard with all threads against two with half of them each: the same processors, plus the
    exchange."""
    threads = max(2, os.cpu_count() or 1)
    group_of = {}
    for count in (1, 2):
        settings = replace(
            settings_for(folder, store, threads // count), population=f"bench-{count}"
        )
        group_of[count] = ShardGroup(settings, GroupSettings(count=count, cpus=0.1))
    try:
        for group in group_of.values():
            group.wait_until_ready()
            group.page_in(REFS, True)
        one, two = (group_of[count].train_wave(wave()) for count in (1, 2))
        assert [u.weights for u in one.updates] == [u.weights for u in two.updates], (
            "not the same bits"
        )

        def train(count: int) -> float:
            return seconds(lambda: group_of[count].train_wave(wave()))

        def decode(count: int) -> float:
            return seconds(lambda: group_of[count].roll_out(requests(16)))

        ratios = [train(2) / train(1) for _ in range(4)]
        yield figure(
            f"step, 2 shards over 1 on the same processors, {USERS} users x {TOKENS} tokens",
            ratios,
            "x",
        )
        decode(2), decode(1)
        ratios = [decode(2) / decode(1) for _ in range(3)]
        yield figure("rollout, 2 shards over 1 on the same processors", ratios, "x")
        recoveries = []
        for turn in range(3):
            victim = ray.get(group_of[2]._shards[turn % 2].pid.remote())
            os.kill(victim, 9)
            start = time.perf_counter()
            try:
                group_of[2].train_wave(wave())
                raise AssertionError("a dead shard trained")
            except Exception as error:
                assert "a shard died" in str(error), error
            group_of[2].start_again()
            group_of[2].page_in(REFS, True)
            group_of[2].train_wave(wave())
            recoveries.append(time.perf_counter() - start)
        yield figure("from a shard's death to the wave trained on the new group", recoveries, "s")
    finally:
        for group in group_of.values():
            group.stop()


def loading(folder: Path, name: str, tiny: Path) -> Iterator[Figure]:
    tensors, num_experts = tensors_of(config_of(str(folder))), dims_of(folder).num_experts
    for shards in (1, 2):
        placement = place_shards(num_experts, shards)
        grown = []
        for rank in range(shards):
            share = sum(tensors[tensor] for tensor in placement.tensors_of(rank, tensors))
            grown.append(measure(folder, rank, shards, tiny)["grown"] / (4 * share))
        yield figure(
            f"{name}: peak memory of loading over a shard's share, {shards} shards",
            grown,
            "x",
            at_most=1.10,
        )


def routing(folder: Path, figures_folder: Path) -> Iterator[Figure]:
    """KL between rollout and trainer under noise in the router, with and without replay of the
    rollout's selection."""
    engine = ShardEngine(settings_for(folder, Path("memory://"), 2), MemoryStore())
    engine.page_in(REFS, True)
    groups = engine.roll_out(requests(24))
    gates = [layer.mlp.gate for layer in engine.base.decoder.layers]
    table: dict[str, list[float]] = {"replay": [], "no replay": [], "out of route": []}
    for noise in NOISES:
        for name in ("replay", "no replay"):
            for number, (layer, gate) in enumerate(
                zip(engine.base.decoder.layers, gates, strict=True)
            ):
                layer.mlp.gate = NoisyGate(gate, noise, number)
            engine.reset()
            engine.page_in(REFS, True)
            lessons = tuple(learn_from(group, name == "replay") for group in groups)
            result = engine.train_wave(WaveBatch(adapters=lessons))
            table[name].append(
                float(np.mean([update.metrics["rollout_kl"] for update in result.updates]))
            )
            if name == "replay":
                otherwise, replayed = result.out_of_route
                table["out of route"].append(otherwise / replayed)
    for name in ("replay", "no replay"):
        for noise, kl in zip(NOISES, table[name], strict=True):
            yield figure(f"KL(rollout, trainer), router noise {noise:g}, {name}", [kl], "nats")
    for noise, share in zip(NOISES, table["out of route"], strict=True):
        yield figure(f"selections out of route, router noise {noise:g}", [share], "")
    _draw(table, figures_folder)


def _draw(table: dict[str, list[float]], folder: Path) -> None:
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    floor = 1e-12
    for name, style in (("no replay", "o-"), ("replay", "s-")):
        axes.plot(range(len(NOISES)), np.maximum(table[name], floor), style, label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(NOISES)), [f"{noise:g}" for noise in NOISES])
    axes.set_xlabel("relative noise in the router's selection")
    axes.set_ylabel("KL(rollout ‖ trainer), nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    drawing.savefig(folder / "routing.png", dpi=130)


def main(names: Sequence[str]) -> None:
    """Everything, or the parts that are named; only everything is published."""
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_base(folder / "base")
        from tests.support import tiny

        tiny.build("mixtral", folder / "tiny")
        parts: dict[str, Callable[[], Iterator[Figure]]] = {
            "loading": lambda: loading(folder / "base", "mid-size Mixtral", folder / "tiny"),
            "routing": lambda: routing(folder / "base", Path("docs/measurements")),
            "steps": lambda: steps(folder / "base", folder / "store"),
        }
        if (prepared := find_prepared("smollm2-moe")) is not None:
            parts["smollm2"] = lambda: loading(
                Path(prepared.folder), "smollm2-moe", folder / "tiny"
            )
        if not names or "steps" in names:
            variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
            ray.init(
                "local", num_cpus=4, include_dashboard=False, log_to_driver=False,
                logging_level="error",
                namespace=NAMESPACE, runtime_env={"env_vars": variables},
            )  # fmt: skip
        for part, take in parts.items():
            if names and part not in names:
                continue
            for item in take():
                figures.append(item)
                print(
                    f"{item.name}: {item.median:.3g} ({item.min:.3g} to {item.max:.3g}) "
                    f"{item.unit}",
                    flush=True,
                )
    if not names:
        publish("The shard group", figures, Path("build/bench/shards.json"))


if __name__ == "__main__":
    main(sys.argv[1:])
