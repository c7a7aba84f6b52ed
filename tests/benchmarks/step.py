"""The fused step against what else there is. `make bench-step`; correctness first, then pairs timed
in turn in one run.

A random Mixtral of 48 M parameters, rank 8 on attention and on experts unless said otherwise.
Ratios are of medians' neighbours: every repetition times both sides, one after the other.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging as transformers_logging

from populace.configs.schema import OptimizerSettings, TrainSettings
from populace.storage.objects.cloud import MemoryStore
from populace.workers.actors.engine import ShardEngine, ShardSettings, keep_freed_memory
from populace.workers.batch import (
    AdapterKey,
    AdapterRef,
    RolloutRequest,
    WaveBatch,
)
from populace.workers.device import device_of
from populace.workers.shapes import AdapterSpec
from populace.workers.step import train as train_step
from populace.workers.step.optimizer import update_adapters
from tests.benchmarks.figures import Figure, figure, publish
from tests.support.waves import likelihood_wave, timing, token_ids

VOCABULARY, HIDDEN, LAYERS, INNER, EXPERTS, TOP_K = 8192, 384, 6, 704, 8, 2
THREADS = os.cpu_count() or 1
REPETITIONS = 4
TOKENS_OF_SURFACE = (8, 32, 128, 512, 1024)
USERS_OF_SURFACE = (1, 4, 16, 64, 256)
TOKENS_TO_REPEAT = 16_384
"""Larger cells of the surface take minutes and are timed once."""


def build_base(folder: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=2048,
        initializer_range=0.05,
    )
    MixtralForCausalLM(config).to(device_of("cpu", "auto").dtype).save_pretrained(folder)


class Bench:
    """An engine with adapters in it."""

    def __init__(
        self,
        folder: Path,
        ranks: Sequence[int],
        *,
        numerics: str = "invariant",
        offload: bool = False,
        slots: int = 0,
    ) -> None:
        train = TrainSettings(numerics=numerics, kl_coefficient=0.0)
        settings = ShardSettings(
            base_folder=str(folder),
            dtype="auto",
            store_url="memory://",
            population="bench",
            slots=slots or len(ranks),
            threads=THREADS,
            eos_ids=frozenset(),
            train=train,
            optimizer=OptimizerSettings(offload=offload),
        )
        self.engine = ShardEngine(settings, MemoryStore())
        self.keys = [AdapterKey(f"{number:032x}", 0) for number in range(len(ranks))]
        specs = [AdapterSpec(rank=r, expert_rank=r, alpha=32, learning_rate=1e-4) for r in ranks]
        self.engine.page_in(
            [
                AdapterRef(key=k, spec=s, seed=i)
                for i, (k, s) in enumerate(zip(self.keys, specs, strict=True))
            ],
            True,
        )

    @property
    def num_parameters(self) -> int:
        slab = self.engine.slab
        return sum(slab.exact_layout(slot.spec).size for slot in slab.slots.values())

    def wave(
        self, tokens: int, keys: Sequence[AdapterKey] | None = None, groups: int = 1
    ) -> WaveBatch:
        """Every adapter learns `groups` sequences of `tokens` tokens by likelihood."""
        return likelihood_wave(keys or self.keys, tokens, VOCABULARY, groups=groups)

    def step(self, wave: WaveBatch) -> float:
        start = time.perf_counter()
        self.engine.train_wave(wave)
        return time.perf_counter() - start

    def forward_backward(self, wave: WaveBatch) -> float:
        """Seconds of the passes alone, without optimizer and new bytes."""
        with timing(train_step, "_forward_backward") as seconds:
            self.engine.train_wave(wave)
        return sum(seconds)


class Peft:
    """One user's step as `peft` runs it: LoRA on the same tensors, fused AdamW, clipping."""

    def __init__(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=device_of("cpu", "auto").dtype)
        model.set_experts_implementation("grouped_mm")
        config = LoraConfig(
            r=8,
            lora_alpha=32,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
        self.model = get_peft_model(model, config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def step(self, number: int, tokens: int) -> float:
        """Trains on the sequence of user `number`; returns its loss."""
        ids = torch.from_numpy(token_ids(number, tokens, VOCABULARY)).long()[None]
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)

    def seconds_per_user(self, tokens: int, users: int) -> float:
        start = time.perf_counter()
        for number in range(users):
            self.step(number, tokens)
        return (time.perf_counter() - start) / users


def check(folder: Path) -> None:
    """Before anything is timed: both sides see the same loss, and each user's bytes are those of a
    step alone. That the adapters' values and gradients are right is for
    tests/kernels/test_lora.py and tests/population/tools/test_peft.py."""
    peft, many, one = Peft(folder), Bench(folder, [8] * 8), Bench(folder, [8])
    losses = [peft.step(0, 64)]
    result = many.engine.train_wave(many.wave(64))
    alone = one.engine.train_wave(one.wave(64)).updates[0]
    assert (alone.weights, alone.moments) == (result.updates[0].weights, result.updates[0].moments)
    assert abs(losses[0] - result.updates[0].metrics["loss"]) < 2e-2 * losses[0], (
        losses,
        result.updates[0].metrics,
    )


def pairs(
    left: Callable[[], float], right: Callable[[], float], repetitions: int = REPETITIONS
) -> list[float]:
    """left / right of every repetition, after one of each to warm up."""
    left(), right()
    return [left() / right() for _ in range(repetitions)]


def compare(
    left: Callable[[WaveBatch], float],
    wave: WaveBatch,
    right: Callable[[WaveBatch], float],
    other: WaveBatch,
    repetitions: int = REPETITIONS,
) -> list[float]:
    return pairs(lambda: left(wave), lambda: right(other), repetitions)


def against_peft(folder: Path) -> Iterator[Figure]:
    peft = Peft(folder)
    for users, tokens, aim in ((64, 64, 8.0), (16, 64, None), (256, 64, None), (64, 512, 3.5)):
        bench = Bench(folder, [8] * users)
        wave = bench.wave(tokens)
        ratios = pairs(
            lambda tokens=tokens, users=users: users * peft.seconds_per_user(tokens, 12),
            lambda bench=bench, wave=wave: bench.step(wave),
            3,
        )
        yield figure(f"fused over peft, {users} users x {tokens} tokens", ratios, "x", at_least=aim)


def against_one_adapter(folder: Path) -> Iterator[Figure]:
    for users, aim in ((64, 1.10), (256, 1.25)):
        many, one = Bench(folder, [8] * users), Bench(folder, [8])
        ratios = compare(
            many.forward_backward, many.wave(64), one.forward_backward, one.wave(64, groups=users)
        )
        yield figure(
            f"forward + backward, {users} adapters over one, same tokens", ratios, "x", at_most=aim
        )


def optimizer_bandwidth(folder: Path) -> Iterator[Figure]:
    bench = Bench(folder, [8] * 64)
    bench.step(bench.wave(64))
    adam = bench.engine.settings.optimizer
    source, target = torch.ones(100_000_000), torch.zeros(100_000_000)

    def copy() -> float:
        start = time.perf_counter()
        target.copy_(source)
        return 2 * 4 * len(source) / (time.perf_counter() - start)

    def step() -> float:
        start = time.perf_counter()
        update_adapters(bench.engine.slab, bench.keys, adam)
        # Read: weights, gradient, m, v. Written: weights, m, v. The norm's own reading is not
        # counted as useful.
        return 7 * 4 * bench.num_parameters / (time.perf_counter() - start)

    yield figure("optimizer's bytes/s over the copy's", pairs(step, copy), "x", at_least=0.6)


def ranks_and_numerics(folder: Path) -> Iterator[Figure]:
    left, right = Bench(folder, [8] * 64), Bench(folder, [8] * 64, numerics="fast")
    ratios = compare(left.step, left.wave(64), right.step, right.wave(64), 6)
    yield figure("invariant over fast", ratios, "x", at_most=1.05)
    del left, right
    # In processes of their own: two such slabs and their new bytes don't fit beside each other.
    ratios = [
        _alone(folder, "--ranks", "mixed") / _alone(folder, "--ranks", "uniform") for _ in range(3)
    ]
    yield figure(
        "64 users, ranks 1 to 64 over rank 33 (0.98 x the parameters)", ratios, "x", at_most=1.10
    )


def _alone(folder: Path, *arguments: str) -> float:
    """The figure that this module prints in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.step",
        arguments[0],
        str(folder),
        *arguments[1:],
    ]
    return float(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def measure_ranks(folder: Path, which: str) -> None:
    bench = Bench(folder, list(range(1, 65)) if which == "mixed" else [33] * 64)
    wave = bench.wave(64)
    bench.step(wave)
    print(statistics.median(bench.step(wave) for _ in range(3)))


def model_flops(num_tokens: int) -> float:
    """Forward and backward of a frozen base: twice 2 multiply-adds per active parameter and token;
    no attention."""
    attention = HIDDEN * (384 + 128 + 128) + 384 * HIDDEN
    active = LAYERS * (attention + TOP_K * 3 * HIDDEN * INNER) + VOCABULARY * HIDDEN
    return 2.0 * 2 * active * num_tokens


def efficiency(folder: Path) -> Iterator[Figure]:
    bench = Bench(folder, [8] * 64)
    wave = bench.wave(64)
    size = 2048
    a, b = (torch.randn(size, size) for _ in range(2))

    def product(dtype: torch.dtype, size: int = size) -> float:
        left, right = a[:size, :size].to(dtype), b[:size, :size].to(dtype)
        start = time.perf_counter()
        for _ in range(5):
            left @ right.T  # as a projection does it
        return 5 * 2 * size**3 / (time.perf_counter() - start)

    dtype = bench.engine.base.dtype
    ratios = pairs(lambda: model_flops(64 * 64) / bench.step(wave), lambda: product(dtype))
    yield figure(
        f"model FLOP/s of the whole step over the product's own ({dtype})",
        ratios,
        "x",
        at_least=0.55,
    )
    ratios = pairs(
        lambda: model_flops(64 * 64) / bench.step(wave), lambda: product(torch.bfloat16, 512)
    )
    yield figure(
        "the same over the bf16 product's (emulated where the processor has none)", ratios, "x"
    )
    with (
        timing(train_step, "_forward_backward") as passes,
        timing(train_step, "update_adapters") as optimizer,
    ):
        whole = [bench.step(wave) for _ in range(3)]
    yield figure(
        "share of a step in forward and backward",
        [p / w for p, w in zip(passes, whole, strict=True)],
        "",
    )
    yield figure(
        "share of a step in the optimizer",
        [o / w for o, w in zip(optimizer, whole, strict=True)],
        "",
    )


def rollout(folder: Path) -> Iterator[Figure]:
    bench = Bench(folder, [8] * 64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=device_of("cpu", "auto").dtype)
    model.set_experts_implementation("grouped_mm")
    prompt, new = 16, 48
    ids = torch.from_numpy(
        np.stack([token_ids(n, prompt - 1, VOCABULARY) for n in range(64)])
    ).long()
    requests = [
        RolloutRequest(
            adapter=key,
            event_id=str(n),
            prompt_ids=ids[n].numpy().astype(np.int32),
            num_samples=1,
            max_new_tokens=new,
            temperature=1.0,
        )
        for n, key in enumerate(bench.keys)
    ]

    def ours() -> float:
        start = time.perf_counter()
        groups = bench.engine.roll_out(requests)
        return sum(len(g.samples[0].completion_ids) for g in groups) / (time.perf_counter() - start)

    def theirs() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                pad_token_id=0,
            )
        return (out.shape[1] - prompt) * len(out) / (time.perf_counter() - start)

    ours(), theirs()
    speeds = [(ours(), theirs()) for _ in range(3)]
    yield figure("rollout, 64 rows with 64 adapters", [one for one, _ in speeds], "tokens/s")
    yield figure(
        "Hugging Face generate, 64 rows, no adapter", [other for _, other in speeds], "tokens/s"
    )
    yield figure("rollout over generate", [one / other for one, other in speeds], "x", at_least=5.0)


def thousand(folder: Path) -> Iterator[Figure]:
    bench = Bench(folder, [1] * 1000)
    resident = _resident_bytes()
    wave = bench.wave(16)
    bench.step(bench.wave(16, bench.keys[:100]))
    after_100 = _resident_bytes()
    seconds = [bench.step(wave) for _ in range(2)]
    yield figure("1,000 rank-1 adapters x 16 tokens in one wave", seconds, "s")
    yield figure("the same, updates per second", [1000 / s for s in seconds], "1/s")
    slab = bench.engine.slab
    row = slab.memory.layout(slab.slots[bench.keys[0]].address).size * 4 / 1e6
    yield figure("memory of a slot that holds an adapter (weights)", [row], "MB")
    yield figure(
        "memory that 100 of 1,000 adapters' first step took, per adapter",
        [(after_100 - resident) / 100e6],
        "MB",
    )
    plain = bench.engine.settings.optimizer
    offloaded = dataclasses.replace(plain, offload=True)

    def timed(adam: OptimizerSettings) -> float:
        start = time.perf_counter()
        update_adapters(slab, bench.keys, adam)
        return time.perf_counter() - start

    ratios = pairs(lambda: timed(offloaded), lambda: timed(plain), 3)
    yield figure("CPUAdam's time over the slab optimizer's, 1,000 adapters", ratios, "x")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory(folder: Path) -> Iterator[Figure]:
    """In processes of their own: the peak without the slab and without the new bytes that the step
    returns."""
    peaks = {}
    for users in (1, 64):
        peaks[users] = _alone(folder, "--memory", str(users))
    yield figure(
        "peak memory, 64 adapters over one (without slab and new bytes)",
        [peaks[64] / peaks[1]],
        "x",
        at_most=1.10,
    )


def measure_memory(folder: Path, users: int) -> None:
    bench = Bench(folder, [8] * users)
    bench.step(bench.wave(64, groups=64 // users))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(peak - bench.num_parameters * 4 * (4 + 3))


def surface(folder: Path) -> tuple[list[Figure], str]:
    """Updates per second, fused over one after another, by users and tokens per user."""
    figures = []
    lines = [
        "| users \\ tokens | " + " | ".join(map(str, TOKENS_OF_SURFACE)) + " |",
        "|---" * 6 + "|",
    ]
    bench = Bench(folder, [8] * max(USERS_OF_SURFACE))
    for users in USERS_OF_SURFACE:
        cells = []
        for tokens in TOKENS_OF_SURFACE:
            wave, some = bench.wave(tokens, bench.keys[:users]), bench.keys[: min(users, 6)]
            alone = [bench.wave(tokens, [key]) for key in some]
            ratios = [
                users * float(np.mean([bench.step(one) for one in alone])) / bench.step(wave)
                for _ in range(
                    3 if users * tokens <= 4096 else 2 if users * tokens <= TOKENS_TO_REPEAT else 1
                )
            ]
            figures.append(
                figure(f"fused over sequential, {users} users x {tokens} tokens", ratios, "x")
            )
            cells.append(f"{figures[-1].median:.2f}")
            print(f"{figures[-1].name}: {figures[-1].median:.3g}", flush=True)
        lines.append(f"| {users} | " + " | ".join(cells) + " |")
    return figures, "\n".join(lines)


def main(names: Sequence[str]) -> None:
    """Everything, or the parts that are named; only everything is published."""
    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_base(folder)
        check(folder)
        print(f"correct; {THREADS} threads, {device_of('cpu', 'auto').dtype}", flush=True)
        figures: list[Figure] = []
        parts = (
            against_peft,
            against_one_adapter,
            optimizer_bandwidth,
            ranks_and_numerics,
            efficiency,
            rollout,
        )
        for part in (*parts, thousand, peak_memory):
            if names and part.__name__ not in names:
                continue
            for item in part(folder):
                figures.append(item)
                print(
                    f"{item.name}: {item.median:.3g} ({item.min:.3g} to {item.max:.3g}) "
                    f"{item.unit}",
                    flush=True,
                )
            gc.collect()
        if names and "surface" not in names:
            return
        cells, table = surface(folder)
        print(table)
        if names:
            return
        publish("The fused step", [*figures, *cells], Path("build/bench/step.json"))


if __name__ == "__main__":
    if sys.argv[1:2] in (["--memory"], ["--ranks"]):
        torch.set_num_threads(THREADS)
        keep_freed_memory()
        if sys.argv[1] == "--memory":
            measure_memory(Path(sys.argv[2]), int(sys.argv[3]))
        else:
            measure_ranks(Path(sys.argv[2]), sys.argv[3])
    else:
        main(sys.argv[1:])
