"""Taking experience in: repetitions, ids that are integers, held-out events, and logs that are cut
off behind."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.experience.events import Demonstration, LogEvent, Task
from populace.population.experience.log import ExperienceLog
from populace.population.experience.memory import EventMemory
from populace.population.experience.pending import PendingIndex
from populace.population.experience.segments import partition_of
from populace.population.experience.states import EventState
from populace.population.ledger.ledger import Ledger
from populace.population.ledger.upkeep import Upkeep
from populace.storage.errors import Damaged, StoreUnavailable
from populace.storage.log.records import Compaction
from populace.storage.objects.cloud import MemoryStore
from populace.storage.objects.contract import ObjectStore
from tests.support.accounting import account
from tests.support.loops import Loop, owned_ledger, run_to_the_end
from tests.support.streams import experience

Start = Callable[..., Loop]


@pytest.fixture
def population(settings: Settings) -> Population:
    return Population.create(MemoryStore(), dataclasses.replace(settings, partitions=1))


def demo(event_id: object, completion: str = "the sea") -> Demonstration:
    return Demonstration(prompt="yes", completion=completion, event_id=event_id)  # type: ignore[arg-type]


def pending_ids(ledger: Ledger, user: str) -> list[tuple[str, EventState]]:
    """Ids and states of what waits, in order."""
    waiting = ledger.pending.waiting(ledger.pseudonym(user))
    events = ledger.events(0, [item.position for item in waiting])
    return [
        (logged.event.event_id, item.state) for logged, item in zip(events, waiting, strict=True)
    ]


def test_a_repetition_through_another_producer_falls_out(population: Population) -> None:
    other = Population.open(population.store, population.settings)
    for sender in (population, other, population):
        sender.enqueue_many([("ada", [demo("1"), demo("2")]), ("bob", [demo("1")])])
    ledger = population.ledger
    ledger.refresh()
    assert pending_ids(ledger, "ada") == [("1", EventState.PENDING), ("2", EventState.PENDING)]
    assert pending_ids(ledger, "bob") == [("1", EventState.PENDING)]


def test_integer_ids_fall_out_for_ever_and_must_increase(population: Population) -> None:
    ledger = population.ledger
    memory = ledger.consumers[0].memory = EventMemory(horizon=4)
    population.enqueue("ada", [demo(5)])
    population.enqueue("ada", [demo(3)])
    ledger.refresh()
    assert [state for _, state in pending_ids(ledger, "ada")] == [
        EventState.PENDING,
        EventState.OUT_OF_ORDER,
    ], "all is remembered: it came out of order"
    for number in range(20):
        population.enqueue("bob", [demo(f"filler-{number}")])
    population.enqueue("ada", [demo(6), demo(5)])
    ledger.refresh()
    assert memory.has_forgotten
    assert [name for name, _ in pending_ids(ledger, "ada")] == ["5", "3", "6"], (
        "5 is a repetition, however old"
    )


@given(st.lists(st.integers(0, 60), max_size=200), st.integers(1, 16))
def test_the_memory_knows_at_least_its_horizon_and_survives_being_saved(
    numbers: list[int], horizon: int
) -> None:
    memory, order = EventMemory(horizon), []
    for number in numbers:
        tag = f"{number:032x}"
        (known,) = memory.find([tag]).tolist()
        if number in order[-horizon:]:
            assert known == number + 1
        if not known:
            order.append(number)
            memory.add([tag], [number + 1])
    loaded = EventMemory.load(memory.dump(), horizon)
    tags = [f"{other:032x}" for other in range(61)]
    assert loaded.find(tags).tolist() == memory.find(tags).tolist()
    assert loaded.has_forgotten == memory.has_forgotten


class Model:
    """What the index should hold of one user."""

    def __init__(self) -> None:
        self.waiting: list[tuple[tuple[int, int], int]] = []
        self.held: list[tuple[int, int]] = []


@given(
    st.lists(
        st.one_of(
            st.tuples(
                st.just("add"),
                st.integers(0, 4),
                st.sampled_from(
                    [EventState.PENDING, EventState.PENDING, EventState.CLASH, EventState.HELD]
                ),
            ),
            st.tuples(st.just("consume"), st.integers(0, 4), st.integers(0, 60)),
            st.tuples(st.just("forget"), st.integers(0, 4), st.just(0)),
        ),
        max_size=60,
    )
)
def test_the_pending_index_is_what_a_list_per_user_would_be(
    steps: list[tuple[str, int, int]],
) -> None:
    index, models, segment = (
        PendingIndex(events_per_update=2),
        [Model() for _ in range(5)],
        itertools.count(),
    )
    rows = [index.add_user(f"{user:032x}", 0) for user in range(5)]
    for verb, user, value in steps:
        model = models[user]
        match verb:
            case "add":
                position = (next(segment), user)
                index.add(rows[user], position, value, 10 + user, 0.0)
                if value is EventState.HELD:
                    model.held.append(position)
                else:
                    model.waiting.append((position, value))
            case "consume":
                index.consume(f"{user:032x}", (value, 9))
                model.waiting = [item for item in model.waiting if item[0] > (value, 9)]
            case "forget":
                index.forget(f"{user:032x}")
                models[user] = Model()
        for number, expected in enumerate(models):
            name = f"{number:032x}"
            assert [tuple(item) for item in index.waiting(name)] == expected.waiting
            assert index.heldout(name) == expected.held
            pending = [item for item in expected.waiting if item[1] is EventState.PENDING]
            assert index.users["num_pending"][rows[number]] == len(pending)
            assert index.users["tokens"][rows[number]] == (10 + number) * min(2, len(pending))
    alive = sum(len(model.waiting) + len(model.held) for model in models)
    assert index.events.size <= max(alive + 60, 1)
    found = index.candidates().row_U.tolist()
    assert found == [rows[n] for n, model in enumerate(models) if model.waiting]
    index.mark_busy([f"{0:032x}"], True)
    assert rows[0] not in index.candidates().row_U
    index.mark_busy([f"{0:032x}"], False)
    assert index.candidates().row_U.tolist() == found


def compacting(settings: Settings, every: int = 3) -> Settings:
    stream = dataclasses.replace(settings.stream, compact_every_segments=every)
    evaluation = dataclasses.replace(settings.evaluation, every_waves=1000, heldout_share=0.3)
    return dataclasses.replace(settings, stream=stream, evaluation=evaluation, partitions=1)


def test_a_compacted_log_opens_the_same_and_repetitions_still_fall_out(
    settings: Settings, start: Start
) -> None:
    settings = compacting(settings)
    store = MemoryStore()
    population = Population.create(store, settings)
    sent: dict[str, set[str]] = {}
    controller = start(population)
    for turn in range(6):
        for user, tasks in experience(settings, num_users=6, num_tasks=12):
            own: list[LogEvent] = [task for task in tasks if int(task.event_id[-2:]) % 6 == turn]
            population.enqueue(user, own)
            sent.setdefault(user, set()).update(task.event_id for task in own)
        controller.wave()
    compaction = controller.ledger.catalog.compactions[0]
    assert compaction.floor > 3 and compaction.previous < compaction.floor
    before = {
        name: controller.ledger.pending.heldout(name)
        for name in controller.ledger.pending.pseudonyms()
    }
    population.ownership.release()
    floor = f"test/experience/0/{compaction.floor:020d}"
    assert all(key >= floor for key in store.list("test/experience/0")), "old segments are gone"
    again = Population.open(store, settings)
    again.enqueue_many(experience(settings, num_users=6, num_tasks=12))
    controller = start(again)
    controller.ledger.read_experience()
    after = {name: again.ledger.pending.heldout(name) for name in before}
    assert after == before and sum(map(len, before.values())) > 5
    assert 0 < again.ledger.pending.oldest_wait_s() < 600, (
        "a snapshot doesn't say since when its events wait"
    )
    run_to_the_end(controller)
    tags = outcome_tags(again)
    ledger = again.ledger
    expected = {
        ledger.seals.tag(ledger.pseudonym(user), event)
        for user, ids in sent.items()
        for event in ids
    }
    assert tags == dict.fromkeys(expected, 1)
    again.ownership.release()


def outcome_tags(population: Population) -> dict[str, int]:
    from tests.system.test_endurance import outcomes

    trained, settled, heldout = outcomes(population)
    return dict(trained + settled + heldout)


def test_a_reader_that_was_overtaken_by_a_compaction_reads_on_from_the_snapshot(
    settings: Settings, start: Start
) -> None:
    settings = compacting(settings)
    store = MemoryStore()
    population = Population.create(store, settings)
    reader = Population.open(store, settings)
    population.enqueue_many(experience(settings, num_users=2, num_tasks=4))
    reader.ledger.refresh()
    before = reader.status().heldout_tasks
    controller = start(population)
    for turn in range(5):
        population.enqueue("user-0", [demo(f"more-{turn}")])
        controller.wave()
    run_to_the_end(controller)
    population.ownership.release()
    assert reader.status().pending_events == 0
    assert (
        reader.status().heldout_tasks
        == Population.open(store, settings).status().heldout_tasks
        >= before
    )
    name = next(n for n in reader.ledger.pending.pseudonyms() if reader.ledger.pending.heldout(n))
    assert reader.ledger.events(0, reader.ledger.pending.heldout(name)), (
        "payloads come from the snapshot now"
    )


class Interrupted(Exception):
    pass


def failing(store: ObjectStore, method: str, part: str) -> None:
    real = getattr(store, method)

    def call(key: str, *rest: object) -> object:
        if part in key:
            raise Interrupted
        return real(key, *rest)

    setattr(store, method, call)


@pytest.mark.parametrize(
    ("method", "part"), [("put", "/snapshots/"), ("create", "/floors/"), ("delete", "/experience/")]
)
def test_a_compaction_that_dies_half_way_is_finished_or_forgotten(
    settings: Settings, start: Start, method: str, part: str
) -> None:
    settings = compacting(settings, every=2)
    store = MemoryStore()
    population = Population.create(store, settings)
    population.enqueue_many(experience(settings, num_users=3, num_tasks=8))
    population.enqueue("user-0", [demo("x")])
    ledger, ownership = owned_ledger(store, population.meta, 0.05)
    ledger.read_experience()
    wanted = account(population).acknowledged
    real = getattr(store, method)
    failing(store, method, part)
    with pytest.raises(Interrupted):
        compaction = ledger.consumers[0].write_snapshot(ledger.catalog)
        ledger.append(0, compaction)
        ledger.consumers[0].finish_compaction(compaction)
    setattr(store, method, real)
    ownership.give_up()
    # A producer that knows nothing of it, and the next owner.
    Population.open(store, settings).enqueue("user-1", [demo("late")])
    again = Population.open(store, settings)
    controller = start(again)
    run_to_the_end(controller)
    tags = outcome_tags(again)
    assert set(tags.values()) == {1} and len(tags) == sum(map(len, wanted.values())) + 1
    again.ownership.release()


def test_a_floor_that_was_not_written_is_written_before_the_next_one(
    settings: Settings, start: Start
) -> None:
    settings = compacting(settings, every=3)
    store = MemoryStore()
    population = Population.create(store, settings)
    controller = start(population)
    ledger, create = controller.ledger, store.create

    def away(key: str, body: bytes) -> None:
        if "/floors/" in key:
            raise StoreUnavailable("away")
        create(key, body)

    for turn in range(12):
        population.enqueue("ada", [demo(f"event-{turn}")])
        store.create = away if ledger.catalog.compactions.get(0) is None else create  # type: ignore[method-assign]
        controller.wave()
        if controller.upkeep._cleaning is not None:
            controller.upkeep._cleaning.result()
    assert ledger.catalog.compactions[0].previous > 0, "there was a second one"
    late = Population.open(store, settings)
    late.enqueue("ada", [demo("late")])
    assert ledger.read_experience() == 1, "a producer that starts now finds the end of the log"
    run_to_the_end(controller)
    assert set(outcome_tags(population).values()) == {1} and len(outcome_tags(population)) == 13
    population.ownership.release()


def test_the_longest_log_is_compacted_first_and_a_backlog_is_not_copied_for_ever(
    settings: Settings,
) -> None:
    settings = dataclasses.replace(settings, partitions=2)
    population = Population.create(MemoryStore(), settings)
    ledger, upkeep = population.ledger, Upkeep(population.ledger)
    users = [
        next(f"user-{n}" for n in range(99) if partition_of(f"user-{n}", 2) == p) for p in (0, 1)
    ]
    population.ownership.claim(0.05)
    for turn in range(12):
        for user in users:
            population.enqueue(user, [demo(f"event-{turn}")])
        if turn > 5:
            population.enqueue(users[1], [demo(f"more-{turn}")])
        ledger.read_experience()
        upkeep.compact(6)
        if upkeep._cleaning is not None:
            upkeep._cleaning.result()
    # Nothing is trained on: what was copied once is all that is there, and more than what came
    # since.
    assert {p: (done.previous, done.floor) for p, done in ledger.catalog.compactions.items()} == {
        0: (0, 6),
        1: (0, 8),
    }
    population.ownership.release()


def test_an_append_below_the_floor_is_repeated_above_it(population: Population) -> None:
    store = population.store
    for number in range(3):
        population.enqueue("ada", [demo(str(number))])
    late = ExperienceLog(store, "test", 0)
    late._next = 1  # what it knew before it slept
    log = ExperienceLog(store, "test", 0)
    log.raise_floor(0, 3)
    log.delete_below(3)
    row = {"pseudonym": "0" * 32, "tag": "0" * 32, "sealed": b"x"}
    assert late.append([row]) == 3
    assert list(store.list("test/experience/0")) == [f"test/experience/0/{3:020d}.arrow"]
    assert ExperienceLog(store, "test", 0).append([row]) == 4, (
        "a fresh producer starts at the floor"
    )


def test_floors_only_rise(population: Population) -> None:
    log = ExperienceLog(population.store, "test", 0)
    log.raise_floor(0, 3)
    log.raise_floor(3, 9)
    log.raise_floor(0, 2)  # of an owner that was fenced long ago
    assert ExperienceLog(population.store, "test", 0).floor() == 9


def test_a_damaged_snapshot_is_named_and_never_loaded(
    settings: Settings, start: Start, tmp_path: Path
) -> None:
    settings = compacting(settings)
    store = MemoryStore()
    population = Population.create(store, settings)
    for turn in range(5):
        population.enqueue("ada", [Task(prompt="rain", reward="letters", event_id=f"t{turn}")])
    ledger, ownership = owned_ledger(store, population.meta, 0.05)
    ledger.read_experience()
    compaction: Compaction = ledger.consumers[0].write_snapshot(ledger.catalog)
    ledger.append(0, compaction)
    ledger.consumers[0].finish_compaction(compaction)
    ownership.release()
    body = store.get(compaction.snapshot)
    for position in np.linspace(0, len(body) - 1, 40).astype(int).tolist():
        store.put(
            compaction.snapshot,
            body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :],
        )
        with pytest.raises(Damaged, match="is not what its record vouches for"):
            Population.open(store, settings).status()
    store.put(compaction.snapshot, body)
    assert (
        Population.open(store, settings).status().pending_events
        + Population.open(store, settings).status().heldout_tasks
        == 5
    )
