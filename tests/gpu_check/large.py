"""What a step costs on a base of real size, whose weights are drawn on the device."""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig

from populace.configs.schema import OptimizerSettings, TrainSettings
from populace.storage.objects.cloud import MemoryStore
from populace.workers.actors.engine import ShardEngine, ShardSettings
from populace.workers.base.families import dims_of_config
from populace.workers.base.footprint import config_of, tensors_of
from populace.workers.base.registry import prepare_base
from populace.workers.batch import AdapterKey, AdapterUpdate, RolloutRequest
from populace.workers.device import device_of
from populace.workers.memory import WaveLimits, active_parameters, held_of, plan_memory
from populace.workers.shapes import AdapterSpec
from populace.workers.step import train as train_step
from tests.gpu_check.check import Check, LeftOut
from tests.gpu_check.machine import products
from tests.gpu_check.theirs import Theirs
from tests.support.waves import likelihood_wave, timing, token_ids

ATTENTION = AdapterSpec(rank=8, expert_rank=1, alpha=32, learning_rate=1e-4, targets="attention")
EVERYTHING = dataclasses.replace(ATTENTION, targets="both")
PROMPT = 16
"""Tokens of a prompt that is answered."""
ROWS = (4096, 3072, 2048, 1536, 1024, 768, 512, 256)
"""Of a pass: the first that fits."""


@dataclass(slots=True)
class Bench:
    """An engine on a seeded base, and adapters in it."""

    engine: ShardEngine
    spec: AdapterSpec
    vocabulary: int
    flops_per_token: float
    """Forward and backward of a frozen base: twice 2 per active parameter; no attention."""

    @property
    def experts(self) -> tuple[int, ...]:
        """Those that an adapter has tensors for."""
        return tuple(range(self.engine.base.dims.num_experts)) if self.spec.ranks[1] else ()

    def requests(self, keys: Sequence[AdapterKey], samples: int, new: int) -> list[RolloutRequest]:
        """For each adapter a prompt of its own, answered `samples` times in `new` tokens."""
        return [
            RolloutRequest(
                adapter=key,
                event_id=str(number),
                prompt_ids=token_ids(number, PROMPT - 1, self.vocabulary),
                num_samples=samples,
                max_new_tokens=new,
                temperature=1.0,
            )
            for number, key in enumerate(keys)
        ]

    def admit(self, count: int) -> list[AdapterKey]:
        """So many adapters with one another's weights, whose B is zero as at revision 0."""
        engine = self.engine
        engine.settings = dataclasses.replace(engine.settings, slots=count)
        engine.reset()
        keys = [AdapterKey(f"{number:032x}", 0) for number in range(count)]
        layout = engine.slab.exact_layout(self.spec)
        flat = np.random.default_rng(0).normal(0, 0.02, layout.size).astype(np.float32)
        for where in (*layout.dense, *layout.expert):
            if where[-1] == "b":
                layout.view(torch.from_numpy(flat), *where).zero_()
        for seed, key in enumerate(keys):
            engine.slab.take(key, self.spec, seed)
            engine.slab.load(key, flat, None, self.experts)  # type: ignore[arg-type]
        return keys


opened: Bench | None = None
"""The base of this process; sections after `base` use it."""


def bench() -> Bench:
    if opened is None:
        raise LeftOut("the base could not be opened")
    return opened


def open_bench(check: Check, preset: str, spec: AdapterSpec, users: int) -> Bench:
    """The largest pass that the memory plan allows for `users` adapters in training."""
    prepared = prepare_base(preset, lambda stage: None)
    config = config_of(prepared.folder)
    dims, tensors = dims_of_config(config), tensors_of(config)
    device = device_of("cuda", "auto" if not check.dry else "float32")
    held = held_of(dims, tensors, 1, device.dtype.itemsize)
    free = device.free_bytes()  # type: ignore[attr-defined]
    for rows in ROWS:
        limits = WaveLimits(ranks=spec.ranks, slots=users, adapters=users, rows=rows, length=128)
        plan = plan_memory(dims, held, limits, context_bytes=0.0)
        if plan.fits(free):
            break
    else:
        raise LeftOut(f"{plan.needed(plan.largest) / 1e9:.1f} GB are needed, {free / 1e9:.1f} free")
    check.say(
        f"{preset}, {free / 1e9:.1f} GB free: {users} users of ranks {spec.ranks} in passes of "
        f"{rows} rows; by the plan "
        + ", ".join(f"{phase} {plan.needed(phase) / 1e9:.1f} GB" for phase in plan.phases)
    )
    settings = ShardSettings(
        base_folder=prepared.folder,
        dtype=str(device.dtype).removeprefix("torch."),
        device="cuda",
        store_url="memory://",
        population="check",
        slots=users,
        threads=0,
        eos_ids=frozenset(),
        train=TrainSettings(max_rows_per_pass=rows, kl_coefficient=0.0),
        optimizer=OptimizerSettings(),
        limits=limits,
    )
    engine = ShardEngine(settings, MemoryStore(), device=device)
    # An embedding is looked up.
    active = active_parameters(dims, tensors) - config.vocab_size * config.hidden_size
    return Bench(engine, spec, config.vocab_size, 4.0 * active)


def close_bench() -> None:
    """Give the base's memory back."""
    global opened
    opened = None
    gc.collect()
    torch.cuda.empty_cache()


def base(check: Check) -> None:
    """Qwen3-30B-A3B's dimensions from a seed, with room for 64 users."""
    global opened
    users = 2 if check.dry else 64
    with check.device():
        preset = "random:tiny" if check.dry else "random:qwen3-30b-a3b"
        before = torch.cuda.max_memory_allocated()
        opened = open_bench(check, preset, ATTENTION, users)
        torch.cuda.synchronize()
        held = torch.cuda.max_memory_allocated() - before
        check.figure("seconds until the base is there", [check.seconds - check.left_s], "s")
        check.say(f"{held / 1e9:.2f} GB of the card are held then")


def waves(check: Check) -> None:
    """Fused steps by users and tokens, in passes, over one adapter with the same tokens, and one
    user's bytes twice alone and beside everybody."""
    own = bench()
    sizes = ((2, 4),) if check.dry else ((64, 64), (64, 512))
    with check.device():
        rate = statistics.median(products(check)) * 1e12
        for users, tokens in sizes:
            step(check, own, users, tokens, rate)
        same_alone(check, own, 2 if check.dry else 64, 4 if check.dry else 64)
        profile(check, own, *sizes[0])
        if not check.dry and not fits(check, own, 256, 64, rate):
            # Only here has what was held for it lost its last frame.
            check.say("256 users x 64 tokens: their slots don't fit beside the base")
            own.admit(1)
            gc.collect()
            torch.cuda.empty_cache()


def fits(check: Check, own: Bench, users: int, tokens: int, rate: float) -> bool:
    """`step`, where there may be no room for it."""
    try:
        step(check, own, users, tokens, rate)
        return True
    except torch.OutOfMemoryError:
        return False


def step(check: Check, own: Bench, users: int, tokens: int, rate: float) -> None:
    """One size: the whole step, its parts, and what one adapter costs with the same tokens."""
    keys, times = own.admit(users), 5 if tokens < 512 else 3
    wave = likelihood_wave(keys, tokens, own.vocabulary)
    wait = torch.cuda.synchronize
    own.engine.train_wave(wave)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = check.seconds_of(lambda: own.engine.train_wave(wave), times)
    # Apart from the figure of the whole, because the parts are waited for.
    with (
        timing(train_step, "_forward_backward", wait) as passes,
        timing(train_step, "update_adapters", wait) as optimizer,
    ):
        repeats = 1 + len(check.seconds_of(lambda: own.engine.train_wave(wave), 3))
    turns = len(passes) // repeats
    size = f"{users} users x {tokens} tokens"
    aim = {"at_most": 600.0} if (users, tokens) == (64, 64) else {}
    check.figure(f"{size}, the whole step", [1e3 * s for s in whole], "ms", **aim)
    by_step = [sum(passes[n * turns : (n + 1) * turns]) for n in range(1, repeats)]
    check.figure(f"{size}, forward and backward", [1e3 * s for s in by_step], "ms")
    check.figure(f"{size}, norms and optimizer", [1e3 * s for s in optimizer[1:]], "ms")
    check.figure(
        f"{size}, model FLOP/s over the bf16 product's",
        [own.flops_per_token * users * tokens / s / rate for s in whole],
        "x",
    )
    peak = torch.cuda.max_memory_allocated()
    rows = min(users * tokens, own.engine.settings.train.max_rows_per_pass)
    a_row = (peak - before) / rows / own.engine.base.dims.num_layers
    new_bytes = 3 * 4 * own.engine.slab.exact_layout(own.spec).size * users
    check.say(
        f"{size}: {turns} passes; at most {peak / 1e9:.1f} GB held, {(peak - before) / 1e9:.1f} of "
        f"them in a pass, {a_row / 1e3:.0f} kB a row and layer; {new_bytes / 1e9:.2f} GB of new "
        "bytes on the host"
    )
    one = own.admit(1)
    alone = likelihood_wave(one, tokens, own.vocabulary, groups=users)
    own.engine.train_wave(alone)
    with timing(train_step, "_forward_backward", wait) as single:
        check.seconds_of(lambda: own.engine.train_wave(alone), 3)
    each = [sum(single[n * turns : (n + 1) * turns]) for n in range(1, repeats)]
    ratios = [many / statistics.median(each) for many in by_step]
    aims = {"at_most": 1.15} if (users, tokens) == (64, 64) else {}
    check.figure(f"{size}, forward and backward over one adapter's", ratios, "x", **aims)


def same_alone(check: Check, own: Bench, users: int, tokens: int) -> None:
    """The bytes of the first user: twice alone, which must be equal, and beside the others."""

    def first(count: int) -> AdapterUpdate:
        keys = own.admit(count)
        update = own.engine.train_wave(likelihood_wave(keys, tokens, own.vocabulary)).updates[0]
        return dataclasses.replace(update, metrics={})

    alone, again, beside = first(1), first(1), first(users)
    check.require(alone == again, "a user trained alone twice gives other bytes")
    same = alone == beside
    check.require(same or own.engine.numerics == "fast", "other bytes beside others")
    check.say(
        f"a user alone twice: {'the same' if alone == again else 'OTHER'} bytes; beside "
        f"{users - 1} others: {'the same' if same else 'others'} (numerics {own.engine.numerics}: "
        f"{own.engine.why_fast or 'by the probe'})"
    )


def profile(check: Check, own: Bench, users: int, tokens: int) -> None:
    """Where a step's time on the device goes, and how much of it is gaps."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    wave = likelihood_wave(own.admit(users), tokens, own.vocabulary)
    own.engine.train_wave(wave)
    (wall,) = check.seconds_of(lambda: own.engine.train_wave(wave), 1)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profiled(activities=activities[:1] if check.dry else activities) as seen:
        own.engine.train_wave(wave)
        torch.cuda.synchronize()
    table = seen.key_averages().table(sort_by="self_device_time_total", row_limit=40)
    (check.out / "profile.txt").write_text(table)
    # Operations carry their kernels' times, too: kernels alone are counted.
    busy = sum(
        event.self_device_time_total
        for event in seen.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    launches = sum(e.count for e in seen.key_averages() if "LaunchKernel" in e.key)
    check.say(
        f"one step: kernels are busy {busy / 1e3:.0f} ms of {wall * 1e3:.0f} ms, {launches} "
        "launches; profile.txt"
    )


def decode(check: Check) -> None:
    """Tokens per second by rows, an adapter each, and what 64 adapters cost over one."""
    own = bench()
    new, sizes = (2, (1, 2)) if check.dry else (24, (1, 64, 128, 256))
    with check.device():
        for rows in sizes:
            if check.left_s < 6:
                check.say(f"{rows} rows: no time left")
                continue
            keys = own.admit(min(rows, 64))
            requests = own.requests(keys, rows // len(keys), new)
            seconds = check.seconds_of(lambda requests=requests: own.engine.roll_out(requests), 3)
            name = f"decode, {rows} rows with {len(keys)} adapters"
            check.figure(name, [rows * new / s for s in seconds], "tokens/s")
            check.figure(f"{name}, a step", [1e3 * s / new for s in seconds], "ms")
            if rows == 64:
                one = own.requests(own.admit(1), rows, new)
                alone = check.seconds_of(lambda one=one: own.engine.roll_out(one), 3)
                middle = statistics.median(alone)
                check.figure(
                    "decode, 64 rows, 64 adapters over one", [s / middle for s in seconds], "x"
                )


def peft(check: Check) -> None:
    """PEFT one user after another, and `generate`, on the same tensors; correct before timed."""
    own = bench()
    users, tokens, some = (2, 4, 1) if check.dry else (64, 64, 8)
    with check.device(ours_alone=False):
        config = AutoConfig.from_pretrained(own.engine.settings.base_folder)
        theirs = Theirs(own.engine, config, "batched_mm" if check.dry else "grouped_mm")
        keys = own.admit(users)
        wave = likelihood_wave(keys, tokens, own.vocabulary)
        losses = [theirs.loss(token_ids(n, tokens, own.vocabulary)) for n in range(some)]
        updates = own.engine.train_wave(wave).updates
        pairs = zip(losses, updates, strict=False)
        gaps = [abs(loss - update.metrics["loss"]) / loss for loss, update in pairs]
        check.require(max(gaps) < 2e-2, f"losses differ by {max(gaps):.1%}")
        check.say(f"the same loss as transformers' within {max(gaps):.2%}")
        ours = check.seconds_of(lambda: own.engine.train_wave(wave), 5)
        theirs.with_lora(8, 32)
        ids = [token_ids(n, tokens, own.vocabulary) for n in range(some)]
        each = check.seconds_of(lambda: [theirs.step(own_ids) for own_ids in ids], 3)
        per_user = statistics.median(each) / some
        check.figure("PEFT, a user's step of 64 tokens", [1e3 * s / some for s in each], "ms")
        check.figure(
            f"fused over PEFT one by one, {users} x {tokens}",
            [users * per_user / s for s in ours],
            "x",
            at_least=10.0,
        )
        theirs.without_lora()
        generates(check, own, theirs, 2 if check.dry else 64, 2 if check.dry else 24)


def generates(check: Check, own: Bench, theirs: Theirs, rows: int, new: int) -> None:
    """Tokens per second of `generate` without an adapter against rollouts with one each."""
    requests = own.requests(own.admit(rows), 1, new)
    ids = np.stack([request.prompt_ids for request in requests])
    seconds = check.seconds_of(lambda: theirs.generate(ids, new), 2)
    ours = check.seconds_of(lambda: own.engine.roll_out(requests), 3)
    check.figure(f"generate, {rows} rows", [rows * new / s for s in seconds], "tokens/s")
    middle = statistics.median(seconds)
    check.figure(f"rollout over generate, {rows} rows", [middle / s for s in ours], "x")


def paging(check: Check) -> None:
    """Bytes per second of adapters to and from the device, as residency and a wave move them."""
    own = bench()
    users = 2 if check.dry else 32
    with check.device():
        keys = own.admit(users)
        slab, size = own.engine.slab, 4 * own.engine.slab.exact_layout(own.spec).size
        blobs = [slab.blobs(key, with_moments=False)[0] for key in keys]

        def load() -> None:
            for key, blob in zip(keys, blobs, strict=True):
                slab.load(key, blob, None, own.experts)

        def dump() -> None:
            dumps = [slab.dump(slab.slots[key], with_moments=False) for key in keys]
            for item in dumps:
                item.parts()

        total = users * size / 1e9
        loads, dumps = check.seconds_of(load), check.seconds_of(dump)
        check.figure("adapters to the device", [total / s for s in loads], "GB/s")
        check.figure("an adapter to the device", [1e3 * s / users for s in loads], "ms")
        check.figure("adapters from the device", [total / s for s in dumps], "GB/s")
