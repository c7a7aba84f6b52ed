"""Waves under way beside each other: nothing is lost, nothing differs, and whatever goes wrong is
taken back."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.controller import EMPTY
from populace.population.experience.events import Demonstration
from populace.storage.errors import Fenced, OutcomeUnknown, StoreUnavailable
from populace.storage.log.loading import BlobRequest, load_wave
from populace.storage.objects.cloud import MemoryStore
from tests.support.accounting import account
from tests.support.loops import Loop, run_to_the_end
from tests.support.streams import experience

Start = Callable[..., Loop]


def with_settings(settings: Settings, **sections: dict[str, Any]) -> Settings:
    parts = {
        name: dataclasses.replace(getattr(settings, name), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(settings, **parts)


@pytest.fixture
def pipelined(settings: Settings) -> Settings:
    return with_settings(
        settings,
        run={"pipelined": True},
        scheduler={"slots": 12},
        evaluation={"every_waves": 1000},
    )


def weights_of(population: Population) -> dict[tuple[str, int], bytes]:
    """Every revision's weights, opened."""
    ledger = population.ledger
    requests = [
        BlobRequest(
            pseudonym=adapter.pseudonym,
            revision=state.revision,
            part="weights",
            place=state.blobs["weights"],
        )
        for adapter in ledger.catalog
        for state in ledger.catalog.revisions_of(adapter.pseudonym)
    ]
    views = load_wave(population.store, ledger.keys, requests)
    return {
        (ledger.keys.get(request.pseudonym).user, request.revision): bytes(view)
        for request, view in zip(requests, views, strict=True)
    }


@pytest.mark.parametrize("slots", [8, 12])
def test_pipelined_waves_make_the_same_bytes_as_one_after_another(
    pipelined: Settings, start: Start, slots: int
) -> None:
    found = []
    for is_pipelined in (True, False):
        settings = with_settings(
            pipelined, run={"pipelined": is_pipelined}, scheduler={"slots": slots}
        )
        population = Population.create(MemoryStore(), settings)
        population.enqueue_many(experience(settings, num_users=14, num_tasks=5))
        controller = start(population)
        under_way = 0
        while controller.wave() is not None:
            under_way = max(under_way, len(controller.busy()))
        assert account(population).is_exact()
        assert under_way > 4 if is_pipelined else under_way == 0
        found.append(weights_of(population))
        population.ownership.release()
    assert found[0] == found[1] and len(found[0]) > 10


def test_a_user_is_in_one_uncommitted_wave_at_most(pipelined: Settings, start: Start) -> None:
    population = Population.create(MemoryStore(), pipelined)
    population.enqueue_many(experience(pipelined, num_users=14, num_tasks=5))
    controller = start(population)
    trained: list[set[str]] = []
    real = controller.workers.train_wave

    def train(batch: Any) -> Any:
        trained.append({item.adapter.pseudonym for item in batch.adapters})
        return real(batch)

    controller.workers.train_wave = train  # type: ignore[method-assign]
    run_to_the_end(controller)
    assert all(not before & now for before, now in itertools.pairwise(trained[:3]))
    population.ownership.release()


def test_a_wave_that_fails_takes_back_what_was_under_way_beside_it(
    pipelined: Settings, start: Start
) -> None:
    population = Population.create(MemoryStore(), pipelined)
    population.enqueue_many(experience(pipelined, num_users=14, num_tasks=5))
    controller = start(population)
    real, calls = controller.workers.train_wave, []

    def train(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) in (2, 5):
            raise MemoryError
        return real(batch)

    controller.workers.train_wave = train  # type: ignore[method-assign]
    failures = waves = 0
    while waves < 100:
        try:
            if controller.wave() is None:
                break
            waves += 1
        except MemoryError:
            failures += 1
            assert not controller.busy() and controller.pipeline == EMPTY
    assert failures == 2 and account(population).is_exact()
    population.ownership.release()


def test_a_store_that_fails_while_a_wave_is_published_stops_the_owner_and_loses_nothing(
    pipelined: Settings, start: Start
) -> None:
    store = MemoryStore()
    population = Population.create(store, pipelined)
    population.enqueue_many(experience(pipelined, num_users=14, num_tasks=5))
    controller = start(population)
    controller.wave()
    real = store.create

    def create(key: str, body: bytes) -> None:
        if "/revisions/" in key:
            raise OutcomeUnknown("503")
        real(key, body)

    store.create = create  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch, pytest.raises((OutcomeUnknown, StoreUnavailable)):
        patch.setattr("time.sleep", lambda seconds: None)
        for _ in range(3):
            controller.wave()
    store.create = real  # type: ignore[method-assign]
    with pytest.raises((OutcomeUnknown, Fenced)):
        controller.wave()
    population.ownership.give_up()
    again = start(population)
    run_to_the_end(again)
    assert account(population).is_exact()
    population.ownership.release()


def test_an_orderly_end_makes_nobody_suspect(pipelined: Settings, start: Start) -> None:
    store = MemoryStore()
    population = Population.create(store, pipelined)
    population.enqueue_many(experience(pipelined, num_users=14, num_tasks=5))
    for _ in range(3):
        controller = start(population)
        controller.wave()
        assert controller.busy()
        controller.take_back()
        assert not controller.busy()
        population.ownership.release()
        population = Population.open(store, pipelined)
    controller = start(population)
    assert (
        not controller.ledger.catalog.attempts.unfinished
        and not controller.planner.suspects.users()
    )
    run_to_the_end(controller)
    assert account(population).is_exact()
    population.ownership.release()


def test_commands_of_users_under_way_wait_for_their_wave(pipelined: Settings, start: Start) -> None:
    store = MemoryStore()
    population = Population.create(store, pipelined)
    users = [f"user-{number:02d}" for number in range(14)]
    for _ in range(3):
        population.enqueue_many(
            (user, [Demonstration(prompt="yes", completion="the sea") for _ in range(2)])
            for user in users
        )
    controller = start(population)
    controller.wave()
    controller.wave()
    busy = next(iter(controller.busy()))
    user = controller.ledger.keys.get(busy).user
    asking = Population.open(store, with_settings(pipelined, run={"takeover_s": 0.6}))
    assert not asking.forget(user), "a controller is alive, and obeys when it can"
    run_to_the_end(controller)
    assert controller.ledger.catalog.is_forgotten(busy)
    population.ownership.release()
