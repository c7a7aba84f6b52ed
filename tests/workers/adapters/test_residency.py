"""Hot, warm, near and cold: the right bytes from wherever they are, shared loads, and nothing that
is needed goes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from populace.configs.schema import ResidencySettings, Settings
from populace.population.client import Population
from populace.storage.lru import Lru
from populace.storage.objects.cloud import MemoryStore
from populace.workers.adapters.near import NearTier
from populace.workers.adapters.residency import Residency
from populace.workers.batch import AdapterRef
from tests.support.loops import Loop, engine_of, settings_of
from tests.support.streams import experience

Start = Callable[..., Loop]


class CountingStore(MemoryStore):
    """Knows which packs were read, and can be made to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0
        self.gate = threading.Event()
        self.gate.set()

    def read_into(self, key: str, offset: int, into: memoryview) -> int:
        self.gate.wait(10)
        self.num_reads += "/packs/" in key
        return super().read_into(key, offset, into)


@pytest.fixture
def trained(
    settings: Settings, start: Start
) -> Iterator[tuple[CountingStore, Population, list[AdapterRef]]]:
    """Ten users with a revision each, in a store; nobody owns it."""
    store = CountingStore()
    settings = dataclasses.replace(
        settings, evaluation=dataclasses.replace(settings.evaluation, every_waves=1000)
    )
    population = Population.create(store, settings)
    population.enqueue_many(experience(settings, num_users=10, num_tasks=6))
    controller = start(population)
    while controller.wave() is not None:
        pass
    population.ownership.release()
    refs = [
        population.ledger.ref(adapter, adapter.tip)
        for adapter in population.ledger.catalog
        if adapter.tip
    ]
    assert len(refs) >= 8
    yield store, population, refs


def residency_of(population: Population, store: CountingStore, **budget: object) -> Residency:
    engine = engine_of(population)
    engine.residency = Residency(
        engine.slab, store, engine.residency.keys, ResidencySettings(**budget)
    )  # type: ignore[arg-type]
    return engine.residency


def bytes_in(residency: Residency, refs: list[AdapterRef]) -> list[tuple[bytes, bytes]]:
    return [residency.slab.blobs(ref.key, with_moments=True) for ref in refs]


def test_an_adapter_has_the_same_bytes_from_every_tier(
    trained: tuple[CountingStore, Population, list[AdapterRef]], tmp_path: Path
) -> None:
    store, population, refs = trained
    first, rest = refs[:4], refs[4:8]
    residency = residency_of(population, store, near_mb=1000.0, near_folder=str(tmp_path / "near"))
    assert residency.page_in(first, True).found == {"hot": 0, "new": 0, "cold": 4}
    expected = bytes_in(residency, first)
    assert residency.page_in(first, True).found["hot"] == 4
    residency.page_in(rest, True)
    residency.page_in(refs[4:8] + refs[:0], True)
    residency.evict([ref.key for ref in first])
    paging = residency.page_in(first, True, keep=[])
    assert paging.found["warm"] == 4 and paging.waited_s < 5
    assert bytes_in(residency, first) == expected
    other = residency_of(population, store, near_mb=1000.0, near_folder=str(tmp_path / "near"))
    reads = store.num_reads
    assert other.page_in(first, True).found["near"] == 4
    assert store.num_reads == reads and bytes_in(other, first) == expected


def test_what_leaves_a_slot_stays_warm_as_it_was_committed(
    trained: tuple[CountingStore, Population, list[AdapterRef]],
) -> None:
    store, population, refs = trained
    residency = residency_of(population, store)
    residency.page_in(refs[:4], True)
    expected = bytes_in(residency, refs[:4])
    for ref in refs[:4]:
        residency._drop_warm(ref.key)
    residency.page_in(refs[4:8], True)  # eight slots: nobody has to go yet
    assert residency.page_in(refs[:4], True).found["hot"] == 4
    residency._cool(refs[0].key)
    residency._hot.drop(refs[0].key)
    reads = store.num_reads
    assert residency.page_in(refs[:1], True).found["warm"] == 1
    assert store.num_reads == reads and bytes_in(residency, refs[:4]) == expected


def test_a_prefetch_returns_at_once_and_paging_in_waits_for_the_same_load(
    trained: tuple[CountingStore, Population, list[AdapterRef]],
) -> None:
    store, population, refs = trained
    residency = residency_of(population, store)
    store.gate.clear()
    before = store.num_reads
    residency.prefetch(refs[:4])
    residency.prefetch(refs[:4])
    threading.Timer(0.3, store.gate.set).start()
    paging = residency.page_in(refs[:4], True)
    reads = store.num_reads - before
    assert paging.found["prefetched"] == 4 and paging.waited_s > 0.1
    alone = residency_of(population, store)
    before = store.num_reads
    alone.page_in(refs[:4], True)
    assert reads == store.num_reads - before, (
        "the two prefetches and the page-in read everything once"
    )


def test_nothing_of_this_or_the_next_wave_is_evicted(
    trained: tuple[CountingStore, Population, list[AdapterRef]],
) -> None:
    store, population, refs = trained
    residency = residency_of(population, store)
    residency.page_in(refs[:4], True)
    keep = [ref.key for ref in refs[:4]]
    for ref in refs[4:8] * 3:
        residency.page_in([ref], True, keep=keep)
        residency.page_in([refs[-1]], True, keep=keep)
        assert all(key in residency.slab.slots for key in keep)


def test_what_is_evicted_follows_from_the_calls_alone(
    trained: tuple[CountingStore, Population, list[AdapterRef]],
) -> None:
    """The shards of a group are processes of their own and must choose the same slots."""
    store, population, refs = trained
    residency = residency_of(population, store)
    for order in (refs[:6], refs[3:8], refs[1:5][::-1]):
        residency.page_in(order, True)
        assert list(residency._hot)[-len(order) :] == [ref.key for ref in order]


def test_the_near_folder_may_lose_and_damage_anything(
    trained: tuple[CountingStore, Population, list[AdapterRef]], tmp_path: Path
) -> None:
    store, population, refs = trained
    near = tmp_path / "near"
    residency = residency_of(population, store, near_mb=1000.0, near_folder=str(near))
    residency.page_in(refs[:4], True)
    expected = bytes_in(residency, refs[:4])
    files = sorted(path for path in near.glob("*/*"))
    assert len(files) == 8, "weights and moments, sealed, by digest"
    files[0].write_bytes(b"damaged")
    files[1].unlink()
    again = residency_of(population, store, near_mb=1000.0, near_folder=str(near))
    found = again.page_in(refs[:4], True).found
    assert found["near"] + found["cold"] == 4 and found["cold"] >= 1
    assert bytes_in(again, refs[:4]) == expected
    for path in near.glob("*/*"):
        assert not any(own[0][:64] in path.read_bytes() for own in expected), (
            "only ciphertext lies there"
        )


def test_a_forgotten_user_leaves_every_tier(
    trained: tuple[CountingStore, Population, list[AdapterRef]], tmp_path: Path
) -> None:
    store, population, refs = trained
    residency = residency_of(population, store, near_mb=1000.0, near_folder=str(tmp_path / "near"))
    residency.page_in(refs[:2], True)
    gone = refs[0].key.pseudonym
    residency.forget([gone])
    assert not any(key.pseudonym == gone for key in (*residency.slab.slots, *residency._blobs))
    assert not list((tmp_path / "near" / gone).glob("*"))
    assert list((tmp_path / "near" / refs[1].key.pseudonym).glob("*"))


def test_the_near_tier_keeps_its_budget_also_over_restarts(
    trained: tuple[CountingStore, Population, list[AdapterRef]], tmp_path: Path
) -> None:
    store, population, refs = trained
    sizes = [
        ref.weights.size_bytes + ref.moments.size_bytes
        for ref in refs
        if ref.weights and ref.moments
    ]
    budget = sum(sizes[:3])
    residency = residency_of(
        population, store, near_mb=budget / 1e6, near_folder=str(tmp_path / "near")
    )
    for ref in refs:
        residency.page_in([ref], True)

    def on_disk() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "near").glob("*/*"))

    assert 0 < on_disk() <= budget
    NearTier(tmp_path / "near", budget // 2)
    assert on_disk() <= budget // 2


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 5), st.sets(st.integers(0, 9), max_size=3)),
        max_size=80,
    )
)
def test_a_tier_never_exceeds_its_capacity_and_evicts_the_least_recently_used(
    steps: list[tuple[int, int, set[int]]],
) -> None:
    tier, order = Lru[int](10), list[tuple[int, int]]()
    for key, size, keep in steps:
        going = tier.put(key, size, keep)
        order = [item for item in order if item[0] != key]
        if going == [key]:
            assert size + sum(its for name, its in order if name in keep) > 10, (
                "only what can't fit stays out"
            )
        else:
            assert not set(going) & keep
            candidates = [name for name, _ in order if name not in keep]
            assert going == candidates[: len(going)]
            order = [item for item in order if item[0] not in going] + [(key, size)]
        assert list(tier) == [name for name, _ in order]
        assert tier.size == sum(its for _, its in order) <= 10


def test_settings_reach_the_shards(settings: Settings) -> None:
    settings = dataclasses.replace(
        settings, residency=ResidencySettings(warm_mb=3, near_mb=5, near_folder="/tmp/x")
    )
    population = Population.create(MemoryStore(), settings)
    shard = settings_of(population)  # type: ignore[arg-type]
    assert shard.residency == settings.residency
