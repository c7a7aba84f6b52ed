"""Getting experience in: durable, in order, once, for many producers at the same time."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from populace.configs.schema import StreamSettings
from populace.population.experience.events import Demonstration
from populace.population.experience.log import ExperienceLog
from populace.population.experience.producer import Producer
from populace.storage.errors import Forgotten, InvalidInput, OutcomeUnknown, Overloaded
from populace.storage.identity import PopulationMeta
from populace.storage.objects.cloud import MemoryStore
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.files import FileStore
from tests.support.loops import ledger_of
from tests.support.race import race
from tests.support.streams import make_population


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    store = FileStore(tmp_path / "store")
    make_population(store, partitions=1)
    yield store


def event(number: object) -> Demonstration:
    return Demonstration(prompt="rain", completion="sea", event_id=str(number))


def order_of(store: ObjectStore, user: str) -> list[str]:
    """A user's event ids as a reader finds them, repetitions included."""
    ledger = ledger_of(store, PopulationMeta.read(store, "pop"))
    return [
        ledger.seals.open(row, (seq, place)).event.event_id
        for log in (item.log for item in ledger.consumers.values())
        for seq, table in log.read_from(0)
        for place, row in enumerate(table.to_pylist())
        if row["pseudonym"] == ledger.pseudonym(user)
    ]


def test_a_users_order_is_kept_over_calls_threads_and_segments(store: FileStore) -> None:
    producer = Producer.open(store, "pop")
    for start in range(0, 30, 3):
        assert producer.enqueue("ada", [event(number) for number in range(start, start + 3)]) == 3
    assert order_of(store, "ada") == [str(number) for number in range(30)]
    producer.close()


def test_calls_made_at_the_same_time_share_segments(store: FileStore) -> None:
    producer = Producer.open(store, "pop", settings=StreamSettings(linger_ms=30))
    users = [f"user-{number}" for number in range(40)]
    threads = [threading.Thread(target=producer.enqueue, args=(user, [event(1)])) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    segments = [len(table) for _, table in ExperienceLog(store, "pop", 0).read_from(0)]
    assert sum(segments) == 40 and len(segments) < 12
    producer.close()


def test_asyncio_keeps_the_order_of_calls_and_returns_when_all_is_durable(store: FileStore) -> None:
    producer = Producer.open(store, "pop")

    async def send() -> None:
        counts = await asyncio.gather(
            *(producer.enqueue_async("ada", [event(number)]) for number in range(50))
        )
        assert counts == [1] * 50
        assert (
            await producer.enqueue_many_async([("bob", [event(1)]), ("cleo", [event(1), event(2)])])
            == 3
        )

    asyncio.run(send())
    assert order_of(store, "ada") == [str(number) for number in range(50)]
    producer.close()


def test_too_much_at_once_is_refused_whole_and_says_when_to_come_back() -> None:
    store = MemoryStore()
    make_population(store, partitions=1)
    slow, create = threading.Event(), store.create

    def wait(key: str, body: bytes) -> None:
        if "/experience/" in key:
            slow.wait(10)
        create(key, body)

    store.create = wait  # type: ignore[method-assign]
    producer = Producer.open(store, "pop", settings=StreamSettings(max_waiting_mb=0.01))
    started = [
        threading.Thread(target=producer.enqueue, args=("ada", [event("x" * 200)] * 20))
        for _ in range(1)
    ]
    for thread in started:
        thread.start()
    time.sleep(0.3)
    with pytest.raises(Overloaded, match=r"try again in") as error:
        producer.enqueue("bob", [event(number) for number in range(40)])
    assert error.value.retry_after_s > 0
    slow.set()
    for thread in started:
        thread.join()
    assert producer.enqueue("bob", [event(1)]) == 1
    assert order_of(store, "bob") == ["1"], "what was refused was not written"
    producer.close()


def test_who_was_forgotten_meanwhile_is_told_and_everybody_elses_events_are_there(
    store: FileStore,
) -> None:
    producer = Producer.open(store, "pop")
    producer.enqueue_many([("ada", [event(1)]), ("bob", [event(1)])])
    producer.keys.forget(producer.seals.pseudonym("ada"))
    with pytest.raises(Forgotten):
        producer.enqueue("ada", [event(2)])
    producer.enqueue("bob", [event(2)])
    assert order_of(store, "bob") == ["1", "2"]
    producer.close()


def test_a_forgetting_anywhere_reaches_every_producer_and_costs_a_call_one_request(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, other = Producer.open(store, "pop"), Producer.open(store, "pop")
    users = [f"user-{number}" for number in range(20)]
    producer.enqueue_many([(user, [event(1)]) for user in users])
    asked: list[str] = []
    for name in ("get", "head"):
        call = getattr(store, name)
        monkeypatch.setattr(store, name, lambda key, call=call: (asked.append(key), call(key))[1])
    producer.enqueue_many([(user, [event(2)]) for user in users])
    assert len([key for key in asked if "/floors/" not in key]) == 1
    other.keys.forget(other.seals.pseudonym("user-3"))
    with pytest.raises(Forgotten):
        producer.enqueue_many([(user, [event(3)]) for user in users])
    producer.enqueue_many([(user, [event(4)]) for user in users if user != "user-3"])
    with pytest.raises(Forgotten):
        producer.enqueue("user-3", [event(4)])
    assert order_of(store, "user-4") == ["1", "2", "3", "4"]
    asked.clear()
    producer.enqueue_many([(user, [event(5)]) for user in users if user != "user-3"])
    assert len([key for key in asked if "/floors/" not in key]) == 1
    producer.close()
    other.close()


def test_a_late_write_of_an_older_forgetting_hides_no_newer_one(store: FileStore) -> None:
    producer, other = Producer.open(store, "pop"), Producer.open(store, "pop")
    producer.enqueue_many([("ada", [event(1)]), ("bob", [event(1)])])
    other.keys.forget(other.seals.pseudonym("bob"))
    producer.enqueue("ada", [event(2)])
    eras = list(store.list("pop/eras"))
    other.keys.forget(other.seals.pseudonym("ada"))
    for key in eras:  # a put that was under way all the time
        store.put(key, b"late")
    with pytest.raises(Forgotten):
        producer.enqueue("ada", [event(3)])
    producer.close()
    other.close()


def test_a_call_that_is_given_up_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    make_population(store, partitions=1)
    producer, create = Producer.open(store, "pop"), store.create
    producer.enqueue("ada", [event(1)])

    def slow(key: str, body: bytes) -> None:
        time.sleep(0.3)
        create(key, body)

    monkeypatch.setattr(store, "create", slow)

    async def give_up() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(producer.enqueue_async("ada", [event(2)]), 0.1)
        assert await producer.enqueue_async("ada", [event(3)]) == 1

    asyncio.run(asyncio.wait_for(give_up(), 20))
    assert order_of(store, "ada") == ["1", "2", "3"], "and what was on its way arrives"
    producer.close()
    with pytest.raises(InvalidInput, match="closed"):
        producer.enqueue("ada", [event(4)])


def test_a_store_that_does_not_answer_is_an_unknown_outcome_and_the_next_call_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore()
    make_population(store, partitions=1)
    producer, create = Producer.open(store, "pop"), store.create
    producer.enqueue("ada", [event(1)])

    def fail(key: str, body: bytes) -> None:
        if "/experience/" in key:
            raise OutcomeUnknown("503")
        create(key, body)

    store.create = fail  # type: ignore[method-assign]
    monkeypatch.setattr("populace.population.experience.log.MAX_UNKNOWN", 1)
    with pytest.raises(OutcomeUnknown, match="send them again with the same"):
        producer.enqueue("ada", [event(2)])
    store.create = create  # type: ignore[method-assign]
    producer.enqueue("ada", [event(2)])
    assert order_of(store, "ada") == ["1", "2"]
    producer.close()


def test_racing_producers_lose_nothing_and_none_starves(store: FileStore) -> None:
    context = multiprocessing.get_context("spawn")  # which imports the module of `race` alone
    results: multiprocessing.Queue[tuple[int, int]] = context.Queue()
    barrier, left = context.Barrier(8), context.Value("i", 1200)
    arguments = [(str(store.root), number, left, barrier, results) for number in range(8)]
    processes = [context.Process(target=race, args=own) for own in arguments]
    for process in processes:
        process.start()
    counts = dict(results.get(timeout=180) for _ in processes)
    for process in processes:
        process.join()
    there = Counter(
        row["pseudonym"]
        for _, table in ExperienceLog(store, "pop", 0).read_from(0)
        for row in table.to_pylist()
    )
    assert {int(name, 16): count for name, count in there.items()} == counts
    assert min(counts.values()) > 0.1 * max(counts.values()), counts


def test_a_population_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidInput, match="no population 'nobody'"):
        Producer.open(MemoryStore(), "nobody")
