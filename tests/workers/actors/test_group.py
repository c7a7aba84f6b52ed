"""A base over several actors computes bit for bit what one process computes, and comes back as one
when it dies."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.util.placement_group import placement_group_table

from populace.configs.schema import GroupSettings, OptimizerSettings, TrainSettings
from populace.storage.errors import InvalidInput, PopulaceError
from populace.storage.objects.cloud import MemoryStore
from populace.workers.actors.engine import ShardEngine, ShardSettings
from populace.workers.actors.group import NAMESPACE, ShardGroup, ShardGroupLost
from populace.workers.actors.shard import NotTheOwner
from populace.workers.batch import AdapterKey, AdapterRef, StepResult, WaveBatch
from tests.support import tiny
from tests.support.heads import ray_here
from tests.workers.step.test_rollout import request
from tests.workers.step.test_train import batch_of, spec_of

NUMBERS = list(range(7))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    variables = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    with ray_here(
        num_cpus=8, logging_level="error", namespace=NAMESPACE, runtime_env={"env_vars": variables},
        _temp_dir=f"/tmp/rs{os.getpid()}",
    ):  # fmt: skip
        yield


@pytest.fixture
def settings(bases: dict[str, Path], tmp_path: Path) -> Callable[..., ShardSettings]:
    def make(family: str, *, offload: bool = False) -> ShardSettings:
        train = TrainSettings(max_rows_per_pass=256)
        return ShardSettings(
            base_folder=str(bases[family]), dtype="float32", store_url=str(tmp_path / "store"),
            population="test",
            slots=16, threads=1, eos_ids=frozenset({1}),
            train=train,
            optimizer=OptimizerSettings(offload=offload),
        )  # fmt: skip

    return make


@pytest.fixture
def start() -> Iterator[Callable[..., ShardGroup]]:
    groups = []

    def start_group(settings: ShardSettings, count: int, **more: Any) -> ShardGroup:
        group = ShardGroup(settings, GroupSettings(count=count, cpus=0.5, timeout_s=120.0, **more))
        groups.append(group)
        group.wait_until_ready()
        return group

    yield start_group
    for group in groups:
        group.stop()


@pytest.fixture(scope="module")
def standing() -> Iterator[Callable[[ShardSettings, int], ShardGroup]]:
    """Groups whose processes and exchange stay between tests, each time with everything else new:
    starting them takes longer than what is tested."""
    groups: dict[int, ShardGroup] = {}

    def start_over(settings: ShardSettings, count: int) -> ShardGroup:
        settings = dataclasses.replace(settings, population=f"standing-{count}", num_shards=count)
        if count not in groups:
            group = ShardGroup(settings, GroupSettings(count=count, cpus=0.5, timeout_s=120.0))
            group.wait_until_ready()
            groups[count] = group
        everywhere(groups[count], load_again, settings)
        return groups[count]

    yield start_over
    for group in groups.values():
        group.stop()


def load_again(engine: ShardEngine, settings: ShardSettings) -> None:
    ShardEngine.__init__(engine, settings, None, engine.base.shard.rank, engine.base.exchange)


def keys_of(numbers: Sequence[int]) -> list[AdapterKey]:
    return [AdapterKey(f"user-{number}", 0) for number in numbers]


def fill(engine: ShardEngine, numbers: Sequence[int]) -> None:
    """Weights with a non-zero B, from each adapter's number."""
    for key, number in zip(keys_of(numbers), numbers, strict=True):
        size = engine.slab.exact_layout(spec_of(number)).size
        values = np.random.default_rng(number).normal(0, 0.05, size).astype(np.float32)
        engine.slab.load(key, values.tobytes(), None, tuple(range(engine.base.dims.num_experts)))


def admit(workers: ShardEngine | ShardGroup, numbers: Sequence[int]) -> None:
    refs = [
        AdapterRef(key=k, spec=spec_of(n), seed=n)
        for k, n in zip(keys_of(numbers), numbers, strict=True)
    ]
    workers.page_in(refs, True)
    everywhere(workers, fill, numbers)


def everywhere(
    workers: ShardEngine | ShardGroup, function: Callable[..., Any], *arguments: Any
) -> None:
    """Run `function(engine, …)` on every shard."""
    if isinstance(workers, ShardEngine):
        function(workers, *arguments)
    else:
        ray.get([shard.__ray_call__.remote(function, *arguments) for shard in workers._shards])


def num_hot(group: ShardGroup) -> int:
    """Adapters in slots; on every shard the same."""
    (count,) = {ray.get(shard.__ray_call__.remote(count_hot)) for shard in group._shards}
    return count


def count_hot(engine: ShardEngine) -> int:
    return len(engine.slab.slots)


def wave_of(numbers: Sequence[int], turn: int) -> WaveBatch:
    return WaveBatch(
        adapters=tuple(
            batch_of(n, key, turn) for n, key in zip(numbers, keys_of(numbers), strict=True)
        )
    )


def two_waves(
    workers: ShardEngine | ShardGroup, numbers: Sequence[int] = NUMBERS
) -> list[StepResult]:
    admit(workers, numbers)
    return [workers.train_wave(wave_of(numbers, turn)) for turn in range(2)]


def assert_same(got: Sequence[StepResult], expected: Sequence[StepResult]) -> None:
    for turn, (one, other) in enumerate(zip(got, expected, strict=True)):
        for mine, theirs in zip(one.updates, other.updates, strict=True):
            assert mine.status == theirs.status
            assert mine.metrics == theirs.metrics, (turn, mine.adapter)
            for part in ("weights", "moments"):
                left, right = (
                    np.frombuffer(getattr(update, part), np.uint8) for update in (mine, theirs)
                )
                assert len(left) == len(right)
                share = (left != right).mean() if len(left) else 0.0
                assert share == 0, (
                    f"{part} of {mine.adapter} in turn {turn}: {share:.1%} of bytes differ"
                )
            assert mine.experts == theirs.experts


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_sharded_wave_and_rollout_are_bitwise_those_of_one_shard(
    settings: Callable[..., ShardSettings],
    standing: Callable[..., ShardGroup],
    family: str,
    count: int,
) -> None:
    alone = ShardEngine(settings(family), MemoryStore())
    group = standing(settings(family), count)
    expected, got = two_waves(alone), two_waves(group)
    assert {update.status for update in expected[1].updates} == {"updated"}
    assert_same(got, expected)
    requests = [request(key, num_samples=2) for key in keys_of(NUMBERS[:5])]
    mine, theirs = group.roll_out(requests), alone.roll_out(requests)
    for one, other in zip(mine, theirs, strict=True):
        for left, right in zip(one.samples, other.samples, strict=True):
            assert np.array_equal(left.completion_ids, right.completion_ids)
            assert np.array_equal(left.logprobs, right.logprobs)
            assert np.array_equal(left.expert_ids, right.expert_ids)
    for left, right in zip(group.score_base(mine), alone.score_base(theirs), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
    assert group.describe()[1] == alone.describe()[1], "the promise of bits is the same"


@pytest.mark.parametrize("numbers", [[3], [2, 5]])
def test_shards_without_a_row_run_along(
    settings: Callable[..., ShardSettings], standing: Callable[..., ShardGroup], numbers: list[int]
) -> None:
    group = standing(settings("mixtral"), 4)
    assert_same(
        two_waves(group, numbers),
        two_waves(ShardEngine(settings("mixtral"), MemoryStore()), numbers),
    )
    (answer,) = group.roll_out([request(keys_of(numbers)[0])])
    assert answer.samples


def make_overflow(engine: ShardEngine, number: int, expert: int) -> None:
    """An A so large that this expert's gradient of B overflows; its own B is zero, so nothing else
    notices."""
    key = keys_of([number])[0]
    slot = engine.slab.slots[key]
    if expert not in engine.base.shard.experts:
        return
    place = expert - engine.base.shard.experts.start
    layout = engine.slab.memory.layout(slot.address)
    weights_P = engine.slab.memory.part(slot.address, "weights")
    for layer in range(engine.base.dims.num_layers):
        for module in ("gate_proj", "up_proj", "down_proj"):
            layout.view(weights_P, module, layer, "a")[place] = 1e30
            layout.view(weights_P, module, layer, "b")[place] = 0.0


def test_a_gradient_that_overflows_on_one_shard_skips_its_adapter_on_all(
    settings: Callable[..., ShardSettings], standing: Callable[..., ShardGroup]
) -> None:
    alone, group = ShardEngine(settings("mixtral"), MemoryStore()), standing(settings("mixtral"), 2)
    results = []
    for workers in (alone, group):
        admit(workers, NUMBERS)
        everywhere(workers, make_overflow, 2, 3)  # expert 3 lies on the second shard
        results.append([workers.train_wave(wave_of(NUMBERS, turn)) for turn in range(2)])
    assert [update.status for update in results[0][0].updates].count("non_finite") == 1
    assert results[0][0].updates[2].status == "non_finite"
    assert_same(results[1], results[0])


def test_the_whole_adapters_norm_decides_how_far_it_is_clipped(
    settings: Callable[..., ShardSettings], standing: Callable[..., ShardGroup]
) -> None:
    group = standing(settings("mixtral"), 2)
    admit(group, NUMBERS)
    wave = WaveBatch(
        adapters=tuple(batch_of(n, k, 0, reward_scale=1e6) for n, k in enumerate(keys_of(NUMBERS)))
    )
    alone = ShardEngine(settings("mixtral"), MemoryStore())
    admit(alone, NUMBERS)
    expected = alone.train_wave(wave)
    limit = alone.settings.optimizer.max_grad_norm
    assert all(update.metrics["grad_norm"] > limit for update in expected.updates), (
        "clipping is at work"
    )
    assert_same([group.train_wave(wave)], [expected])


def test_dense_tensors_are_touched_at_home_only(
    settings: Callable[..., ShardSettings], standing: Callable[..., ShardGroup]
) -> None:
    group = standing(settings("mixtral"), 2)
    two_waves(group)
    homes = [ray.get(shard.__ray_call__.remote(dense_rows_in_use)) for shard in group._shards]
    assert not set(homes[0]) & set(homes[1])
    has_dense = [number for number in NUMBERS if spec_of(number).targets != "experts"]
    assert len(has_dense) < len(NUMBERS)
    assert sorted(homes[0] + homes[1]) == sorted(key.pseudonym for key in keys_of(has_dense))


def dense_rows_in_use(engine: ShardEngine) -> list[str]:
    found = []
    for key, slot in engine.slab.slots.items():
        memory = engine.slab.memory
        dense = slice(0, memory.layout(slot.address).dense_size)
        names = ("weights", "grads", "m", "v")
        if any(bool(memory.part(slot.address, name)[dense].any()) for name in names):
            found.append(key.pseudonym)
    return found


def test_a_group_that_loses_a_shard_starts_again_as_one(
    settings: Callable[..., ShardSettings], start: Callable[..., ShardGroup]
) -> None:
    group = start(settings("mixtral"), 2)
    expected = two_waves(group)
    before = ray.get([shard.pid.remote() for shard in group._shards])
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(ShardGroupLost, match="a shard died"):
        group.train_wave(wave_of(NUMBERS, 2))
    group.start_again()
    assert not set(before) & set(ray.get([shard.pid.remote() for shard in group._shards]))
    assert num_hot(group) == 0
    assert_same(two_waves(group), expected)
    assert group.num_restarts == 0, "a wave that succeeded counts them anew"


def test_a_group_that_always_dies_gives_up(settings: Callable[..., ShardSettings]) -> None:
    group = ShardGroup(settings("mixtral"), GroupSettings(count=2, cpus=0.5, max_restarts=0))
    try:
        with pytest.raises(
            ShardGroupLost, match="started again 0 times in a row and died each time"
        ):
            group.start_again()
    finally:
        group.stop()


def test_what_one_shard_refuses_leaves_the_others_in_step(
    settings: Callable[..., ShardSettings], standing: Callable[..., ShardGroup]
) -> None:
    group = standing(settings("mixtral"), 2)
    admit(group, NUMBERS)
    ray.get(group._shards[0].__ray_call__.remote(refuse_once))
    with pytest.raises(PopulaceError, match="refused on purpose"):
        group.page_in([AdapterRef(key=AdapterKey("late", 0), spec=spec_of(1), seed=9)], True)
    assert num_hot(group) == 0
    alone = ShardEngine(settings("mixtral"), MemoryStore())
    assert_same(two_waves(group), two_waves(alone))


def refuse_once(engine: ShardEngine) -> None:
    page_in = engine.residency.page_in

    def refuse(*arguments: Any) -> int:
        engine.residency.page_in = page_in  # type: ignore[method-assign]
        raise PopulaceError("refused on purpose")

    engine.residency.page_in = refuse  # type: ignore[method-assign]


def test_a_second_controller_goes_on_with_the_loaded_shards(
    settings: Callable[..., ShardSettings], start: Callable[..., ShardGroup]
) -> None:
    first = start(settings("mixtral"), 2)
    admit(first, NUMBERS)
    pids = ray.get([shard.pid.remote() for shard in first._shards])
    second = start(settings("mixtral"), 2)
    assert ray.get([shard.pid.remote() for shard in second._shards]) == pids
    assert num_hot(second) == 0, "what an unknown commit left in a slot is not trusted"
    admit(second, NUMBERS)
    with pytest.raises(NotTheOwner, match="another controller has taken over"):
        first.train_wave(wave_of(NUMBERS, 0))
    first.stop()
    assert num_hot(second) == len(NUMBERS), "the old owner could neither disturb nor remove them"
    third = ShardGroup(settings("qwen3_moe"), GroupSettings(count=2, cpus=0.5))
    try:
        with pytest.raises(ShardGroupLost, match="a shard died"):
            second.evict([])
    finally:
        third.stop()
    left = [item for item in placement_group_table().values() if item["state"] != "REMOVED"]
    assert not [item for item in left if item["name"].startswith("test-")], (
        "no place stays reserved"
    )


def test_a_group_that_finds_no_room_says_so(settings: Callable[..., ShardSettings]) -> None:
    group = ShardGroup(settings("mixtral"), GroupSettings(count=2, cpus=100.0, place_timeout_s=1.0))
    try:
        with pytest.raises(
            InvalidInput, match=r"shard.count is 2 and shard.cpus is 100.0, but the cluster has"
        ):
            group.wait_until_ready()
    finally:
        group.stop()


def test_a_group_on_gpus_asks_for_them(settings: Callable[..., ShardSettings]) -> None:
    asked = dataclasses.replace(settings("mixtral"), device="cuda")
    group = ShardGroup(asked, GroupSettings(count=1, cpus=0.5, place_timeout_s=1.0), gpus=1)
    try:
        with pytest.raises(InvalidInput, match=r"with 1 GPU for each .* 0 GPUs free.*=cpu"):
            group.wait_until_ready()
    finally:
        group.stop()


def test_offloaded_moments_are_the_same_on_shards(
    settings: Callable[..., ShardSettings], standing: Callable[..., ShardGroup]
) -> None:
    alone = ShardEngine(settings("mixtral", offload=True), MemoryStore())
    assert_same(two_waves(standing(settings("mixtral", offload=True), 2)), two_waves(alone))


def test_a_dense_part_cut_by_zero3_gives_the_same_but_for_rounding_in_less_memory(
    settings: Callable[..., ShardSettings], start: Callable[..., ShardGroup]
) -> None:
    """Forward bit for bit; backward adds a row's gradients in an order of DeepSpeed's, so bits are
    not promised."""
    alone = ShardEngine(settings("mixtral"), MemoryStore())
    group = start(settings("mixtral"), 2, dense="zero3")
    assert group.describe()[1]["numerics"] == "fast"
    got, expected = two_waves(group), two_waves(alone)
    for one, other in zip(got[1].updates, expected[1].updates, strict=True):
        mine, theirs = (np.frombuffer(update.weights, np.float32) for update in (one, other))
        assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs)
    assert [u.metrics["loss"] for u in got[0].updates] == [
        u.metrics["loss"] for u in expected[0].updates
    ]
    whole = sum(parameter.numel() for parameter in alone.base.decoder.parameters())
    held = [ray.get(shard.__ray_call__.remote(dense_elements)) for shard in group._shards]
    assert whole <= sum(held) <= 1.1 * whole, (
        "every part is there once, but for what evens them out"
    )


def dense_elements(engine: ShardEngine) -> int:
    return sum(
        parameter.numel() + parameter.ds_tensor.numel()
        for parameter in engine.base.decoder.parameters()
    )
