"""The CUDA shard on a pretended device: what it computes is what a CPU computes, nothing of it
mixes host and device, and the host waits where it is said to and nowhere else."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from populace.configs.schema import TrainSettings
from populace.storage.errors import InvalidInput
from populace.storage.objects.cloud import MemoryStore
from populace.workers.actors.engine import ShardEngine, ShardSettings, join_shares
from populace.workers.actors.group import check_devices
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    AdapterRef,
    RolloutGroup,
    ShardStep,
    TrainGroup,
    WaveBatch,
)
from populace.workers.device import Cuda, device_of
from populace.workers.joins import join_steps
from populace.workers.shards.exchange import BACKENDS, DeepSpeedExchange, Rendezvous
from populace.workers.step import train
from populace.workers.step.numerics import probe_invariance
from tests.support import tiny
from tests.support.parity import (
    SPECS,
    Told,
    admit,
    assert_same,
    requests,
    two_steps,
    wave_of,
)
from tests.support.pretend import Pretended

Make = Callable[..., ShardEngine]

WAITS = {
    "optimizer.py:part_squares": "once a wave: the host decides who is updated",
    "train.py:_add_up": "once a wave, behind the last pass: what passes said",
    "slab.py:parts": "once a wave: new revisions, for the store",
}
DECODING = {
    "rollout.py:_choose": "once a token: the host knows who is done",
    "rollout.py:roll_out": "once a rollout: the record of its routing",
}
EXCHANGING = {
    "moe.py:_on_all_shards": "once a layer, forward: how many rows go where",
}
SCORING = {"engine.py:score_base_share": "once a pass: scores, for rewards"}


@pytest.fixture
def device() -> Pretended:
    return Pretended()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_two_steps_on_the_device_are_those_of_a_cpu(
    device: Pretended, make_engine: Make, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    *_, here = two_steps(make_engine(family, slots=4))
    one_pass, waits_in_passes = train._forward_backward, []

    def counted(*args: object, **kwargs: object) -> None:
        before = device.report.waits.total()
        one_pass(*args, **kwargs)  # type: ignore[arg-type]
        waits_in_passes.append(device.report.waits.total() - before)

    monkeypatch.setattr(train, "_forward_backward", counted)
    with device.here() as report:
        engine = make_engine(family, slots=4, device="cuda")
    assert not report.mixes and not report.hazards
    with device.here() as report:
        *_, there = two_steps(engine)
    report.assert_clean({**WAITS, **DECODING, **SCORING})
    assert waits_in_passes == [0, 0]
    assert_same(engine, there, here)


def test_a_split_wave_adds_up_to_the_whole_one(device: Pretended, make_engine: Make) -> None:
    here = make_engine(slots=6, max_rows=16)
    expected = here.train_wave(wave_of(admit(here)))
    with device.here() as report:
        there = make_engine(slots=4, device="cuda", max_rows=16)
        report.waits.clear()
        got = there.train_wave(wave_of(admit(there)))
    report.assert_clean(WAITS)
    assert_same(there, Told([], [], [got]), Told([], [], [expected]))


def test_a_gpu_without_a_grouped_product_is_not_asked_for_one(make_engine: Make) -> None:
    """Of sm_80, in bf16: torch would multiply expert by expert, and ask for their ends."""
    device = Pretended(compute_capability=(8, 0))
    with device.here():
        assert not Cuda(torch.bfloat16).has_grouped_product
        assert not Cuda(torch.float32).has_grouped_product
    with Pretended(compute_capability=(9, 0)).here():
        assert Cuda(torch.bfloat16).has_grouped_product
    with device.here() as report:
        engine = make_engine(slots=2, device="cuda")
        report.waits.clear()
        (key, *_) = admit_first(engine)
        engine.train_wave(wave_of([key]))
    report.assert_clean(WAITS)


def admit_first(engine: ShardEngine) -> list[AdapterKey]:
    key = AdapterKey("user-0", 0)
    engine.page_in([AdapterRef(key=key, spec=SPECS[0], seed=0)], True)
    return [key]


def test_what_is_loaded_comes_back_bit_for_bit(device: Pretended, make_engine: Make) -> None:
    with device.here() as report:
        engine = make_engine(slots=4, device="cuda")
        report.waits.clear()
        keys, random = admit(engine), np.random.default_rng(0)
        for key, spec in zip(keys, SPECS, strict=True):
            size = engine.slab.exact_layout(spec).size
            weights = random.normal(size=size).astype(np.float32).tobytes()
            moments = np.array([3, 0.5, 2], np.float64).tobytes()
            moments += random.normal(size=2 * size).astype(np.float32).tobytes()
            experts = tuple(range(4)) if spec.ranks[1] else ()
            engine.slab.load(key, weights, moments, experts)
            assert engine.slab.blobs(key, with_moments=True) == (weights, moments)
        # Another set of adapters drives them out, and they come back from host memory.
        new = [AdapterKey(f"user-{n}", 1) for n in range(4)]
        engine.committed(list(zip(keys, new, strict=True)))
        kept = [engine.slab.blobs(key, with_moments=True) for key in new]
        others = [AdapterKey(f"other-{n}", 0) for n in range(4)]
        engine.page_in([AdapterRef(key=k, spec=SPECS[0], seed=9) for k in others], True)
        assert set(engine.slab.slots) == set(others)
        assert [tuple(vars_of(engine, key)) for key in new] == kept
    assert not report.mixes and not report.hazards
    assert all("slab.py:parts" in place for place in report.waits)


def vars_of(engine: ShardEngine, key: AdapterKey) -> tuple[object, object]:
    """A warm revision's bytes."""
    blobs = engine.residency._blobs[key]
    return blobs.weights, blobs.moments


def test_the_probe_runs_on_the_device_and_promises_nothing_there(
    device: Pretended, make_engine: Make
) -> None:
    with device.here() as report:
        engine = make_engine(device="cuda", slots=2)
        # What it can see holds; attention's order of additions on a card it can't.
        assert probe_invariance(engine.base, engine.kernels) == ""
        _, fingerprint = engine.describe()
    assert not report.mixes and not report.hazards and not report.cpu_code
    assert fingerprint["device"] == "cuda" and fingerprint["backend"] == "triton"
    assert fingerprint["gpu"] == "pretended" and fingerprint["compute_capability"] == "9.0"
    assert "cpu" not in fingerprint and fingerprint["numerics"] == "fast"


def held(engine: ShardEngine, key: AdapterKey) -> dict[str, torch.Tensor]:
    memory = engine.slab.memory
    return memory._buffers[engine.slab.slots[key].address.row].parts  # type: ignore[union-attr]


def test_gradient_and_moments_have_memory_only_while_somebody_holds_them(
    device: Pretended, make_engine: Make
) -> None:
    with device.here():
        engine = make_engine(slots=4, device="cuda")
        spec, key = SPECS[0], AdapterKey("user", 0)
        engine.page_in([AdapterRef(key=key, spec=spec, seed=1)], False)
        size = engine.slab.exact_layout(spec).size * 4
        assert set(held(engine, key)) == {"weights"}
        assert engine.slab.memory.held_bytes == size  # type: ignore[union-attr]
        engine.train_wave(wave_of([key]))
        assert set(held(engine, key)) == {"weights", "m", "v"}
        assert engine.slab.memory.held_bytes == 3 * size  # type: ignore[union-attr]


def test_a_slots_gradient_can_wait_on_the_host(device: Pretended, make_engine: Make) -> None:
    with device.here() as report:
        engine = make_engine(slots=4, device="cuda")
        (key, *_) = admit(engine)
        slab = engine.slab
        address = slab.hold_for_training(key).address
        values = torch.arange(float(slab.memory.layout(address).size))
        slab.device.fill(slab.memory.part(address, "grads"), values)
        slab.memory.page_out(address, "grads")  # type: ignore[union-attr]
        assert "grads" not in held(engine, key)
        slab.memory.hold(address, ("grads",))
        (back,) = slab.device.download(slab.memory.part(address, "grads")).tensors()
        assert torch.equal(back, values)
    assert not report.mixes and not report.hazards


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_training_a_revision_that_is_read_copies_it_first(
    device: Pretended, make_engine: Make, where: str
) -> None:
    def run() -> None:
        engine = make_engine(slots=6, device=where)
        slab, key, alone = engine.slab, AdapterKey("user", 0), make_engine(slots=6, device=where)
        ref = AdapterRef(key=key, spec=SPECS[0], seed=1)
        for own in (engine, alone):
            own.page_in([ref], True)
        before = slab.blobs(key, with_moments=False)
        slot = slab.read(key, "a request")
        (update,) = engine.train_wave(wave_of([key])).updates
        (expected,) = alone.train_wave(wave_of([key])).updates
        assert update == expected and update.status == "updated"
        assert slab.slots[key] is slot and slab.trained(key).address != slot.address
        # The reader's revision stays hot beside the new one, as it was.
        new = AdapterKey("user", 1)
        engine.committed([(key, new)])
        assert slab.blobs(key, with_moments=False) == before
        assert slab.blobs(new, with_moments=False)[0] == update.weights
        # A step that isn't committed goes; what is read stays.
        reader = slab.read(new, "another request")
        engine.train_wave(wave_of([new]))
        engine.evict([new])
        assert slab.slots[new] is reader and slab.num_beside == 0
        # A revision that leaves while it is read keeps its slot until the reader is done.
        slab.drop(key)
        assert slab.num_beside == 1
        slab.done_reading("a request")
        assert slab.num_beside == 0
        slab.done_reading("another request")
        assert slab.trained(new).address == reader.address
        slab.hold_for_training(new)
        assert slab.trained(new) is reader, "nobody reads it any more: no copy"

    if where == "cpu":
        return run()
    with device.here() as report:
        run()
    assert not report.mixes and not report.hazards and not report.cpu_code


def test_what_is_read_does_not_get_in_the_way_of_what_comes(make_engine: Make) -> None:
    engine = make_engine(slots=4)
    refs = [AdapterRef(key=AdapterKey(f"u{n}", 0), spec=SPECS[0], seed=n) for n in range(4)]
    engine.page_in(refs[:3], True)
    reader = engine.slab.read(refs[0].key, "a request")
    engine.page_in(refs[:1], True)
    engine.train_wave(wave_of([refs[0].key]))
    engine.committed([(refs[0].key, AdapterKey("u0", 1))])
    engine.page_in(refs[3:], True)
    assert engine.slab.slots[refs[0].key] is reader and len(engine.slab.slots) == 4
    # A copy that is there already takes no second slot.
    small = make_engine(slots=2)
    small.page_in(refs[:1], True)
    small.slab.read(refs[0].key, "a request")
    small.slab.hold_for_training(refs[0].key)
    small.page_in(refs[:1], True)


def test_a_copy_without_an_update_goes_with_its_wave(make_engine: Make) -> None:
    engine = make_engine(slots=2)
    refs = [AdapterRef(key=AdapterKey(f"u{n}", 0), spec=SPECS[0], seed=n) for n in range(3)]
    engine.page_in(refs[:1], True)
    engine.slab.read(refs[0].key, "a request")
    (update,) = engine.train_wave(
        WaveBatch(adapters=(AdapterBatch(adapter=refs[0].key, groups=()),))
    ).updates
    assert update.status == "no_signal" and engine.slab.num_beside == 0
    engine.slab.done_reading("a request")
    engine.page_in(refs[1:], False)


def test_copies_and_readers_count_among_the_slots(make_engine: Make) -> None:
    engine = make_engine(slots=3)
    refs = [AdapterRef(key=AdapterKey(f"u{n}", 0), spec=SPECS[0], seed=n) for n in range(3)]
    engine.page_in(refs[:2], True)
    engine.slab.read(refs[0].key, "a request")
    engine.page_in(refs[:1], True)
    engine.train_wave(wave_of([refs[0].key]))
    # Its revision, the copy and the other one take all three.
    with pytest.raises(InvalidInput, match=r"4 adapters are needed .* scheduler.slots is 3"):
        engine.page_in(refs[1:], False)
    engine.page_in(refs[2:], False)
    assert set(engine.slab.slots) == {refs[0].key, refs[2].key}
    full = make_engine(slots=1)
    full.page_in(refs[:1], True)
    full.slab.read(refs[0].key, "a request")
    with pytest.raises(InvalidInput, match=r"2 adapters are needed .* scheduler.slots is 1"):
        full.page_in(refs[:1], True)
    with pytest.raises(InvalidInput, match="is copied before it is trained: raise it"):
        full.train_wave(wave_of([refs[0].key]))


def run_shard(
    rank: int, rendezvous: Rendezvous, folder: str
) -> tuple[ShardStep, list[RolloutGroup | None], bool]:
    """One of two shards on pretended devices, in a process of its own. Gloo is what NCCL would
    be."""
    torch.set_num_threads(1)
    device, gloo = Pretended(), mock.patch.dict(BACKENDS, cuda="gloo")
    with device.here() as report, gloo:
        cuda = Cuda(torch.float32)
        settings = ShardSettings(
            base_folder=folder,
            dtype="float32",
            device="cuda",
            store_url="memory://",
            population="test",
            slots=4,
            threads=1,
            eos_ids=frozenset({1}),
            train=TrainSettings(kl_coefficient=0.05),
            num_shards=2,
        )
        exchange = DeepSpeedExchange(rank, 2, rendezvous, cuda)
        engine = ShardEngine(settings, MemoryStore(), rank, exchange, cuda)
        keys = admit(engine)
        report.waits.clear()
        step = engine.train_share(wave_of(keys))
        report.assert_clean({**WAITS, **EXCHANGING})
        groups = engine.roll_out_share(requests(keys))
        # Everybody to experts of the first shard: nothing comes to the second.
        one = np.zeros((5, *engine.base.routing_shape), np.int16) + np.arange(2, dtype=np.int16)
        wave = wave_of(keys)
        crowded = tuple(
            dataclasses.replace(batch, groups=(with_experts(batch.groups[0], one),))
            for batch in wave.adapters
        )
        updates = engine.train_share(WaveBatch(adapters=crowded)).updates
    return step, groups, all(update.status == "updated" for update in updates)


def with_experts(group: TrainGroup, ids: np.ndarray) -> TrainGroup:
    """A group whose rows all go where `ids` say."""
    (scored,) = group.samples
    sample = dataclasses.replace(scored.sample, expert_ids=ids[: len(scored.sample.completion_ids)])
    return dataclasses.replace(
        group,
        prompt_expert_ids=ids[: len(group.prompt_ids)],
        samples=(dataclasses.replace(scored, sample=sample),),
    )


def test_two_shards_on_devices_give_what_one_cpu_gives(
    make_engine: Make, bases: dict[str, Path]
) -> None:
    here = make_engine("qwen3_moe", slots=4)
    keys = admit(here)
    expected, rolled = here.train_wave(wave_of(keys)), here.roll_out(requests(keys))
    meeting, folder = Rendezvous.at("127.0.0.1", 120.0), str(bases["qwen3_moe"])
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        shards = [pool.submit(run_shard, rank, meeting, folder) for rank in range(2)]
        steps, groups, ends = zip(*(shard.result() for shard in shards), strict=True)
    assert ends == (True, True), "a layer in which no row came to the other shard"
    assert all(any(group is not None for group in own) for own in groups), "both have users"
    got = Told([join_shares(groups)], [], [join_steps(steps)])
    assert_same(here, got, Told([rolled], [], [expected]))


def test_the_dtype_follows_the_device_that_computes(device: Pretended) -> None:
    """A CUDA device that is merely visible says nothing about a CPU beside it."""
    native = device_of("cpu", "auto").dtype
    assert device_of("auto", "auto").kind == "cpu"
    with device.here():
        assert device_of("cpu", "auto").dtype is native
        assert device_of("cpu", "auto").kind == "cpu"
        chosen = device_of("auto", "auto")
        assert chosen.kind == "cuda" and chosen.dtype is torch.bfloat16
        assert device_of("cuda", "float32").dtype is torch.float32


def test_the_devices_of_a_group_must_be_of_one_kind() -> None:
    check_devices(["cuda in bfloat16"] * 3)
    with pytest.raises(InvalidInput, match=r"compute on cpu in float32, cuda in bf"):
        check_devices(["cuda in bfloat16", "cpu in float32"])


def test_what_a_device_can_not_do_is_refused_in_one_line(
    device: Pretended, make_engine: Make
) -> None:
    with pytest.raises(
        InvalidInput, match=r"base.device is 'cuda', but .*torch .* or use base.device=cpu"
    ):
        make_engine(device="cuda")
    with pytest.raises(InvalidInput, match=r"train.backend is 'triton', which doesn't run"):
        make_engine(backend="triton")
    with device.here():
        with pytest.raises(InvalidInput, match=r"'grouped', which doesn't run where"):
            make_engine(device="cuda", backend="grouped")
        with pytest.raises(InvalidInput, match=r"optimizer.offload is true"):
            make_engine(device="cuda", offload=True)
