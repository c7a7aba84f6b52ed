"""Controllers that share a population: everybody gets a fair part, and who dies is replaced."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.controller import Controller
from populace.population.ledger.ledger import Ledger
from populace.population.ledger.sharing import share_out
from populace.population.waves.chat import Chat
from populace.storage.errors import OutcomeUnknown, OwnerAlive, StoreUnavailable
from populace.storage.objects.cloud import MemoryStore
from populace.workers.actors.engine import ShardEngine
from tests.accounting import account
from tests.conftest import score_here
from tests.streams import experience, wait_until

NAMES = ["a", "b", "c", "d"]


@given(st.integers(1, 12), st.sets(st.sampled_from(NAMES), min_size=1), st.randoms())
def test_controllers_reach_a_fair_share_without_talking(
    num_partitions: int, living: set[str], random: object
) -> None:
    """In any order of turns, from any start: everybody ends with as many as the others, give or
    take one, no partition is ever held twice, and then nobody moves any more."""
    chance = random
    holders: dict[int, str | None] = {
        partition: chance.choice([None, *sorted(living)])  # type: ignore[attr-defined]
        for partition in range(num_partitions)
    }
    for _ in range(40):
        order = sorted(living)
        chance.shuffle(order)  # type: ignore[attr-defined]
        for name in order:
            claims, releases = share_out(name, holders, living)
            assert all(holders[partition] is None for partition in claims)
            assert all(holders[partition] == name for partition in releases)
            holders |= dict.fromkeys(claims, name) | dict.fromkeys(releases, None)
    counts = [sum(holder == name for holder in holders.values()) for name in living]
    assert sum(counts) == num_partitions and max(counts) - min(counts) <= 1
    assert all(share_out(name, holders, living) == ((), ()) for name in living)


def controller_of(population: Population, name: str) -> Controller:
    settings = population.settings
    chat = Chat(population.base().folder)
    engine = ShardEngine(population.shard_settings(population.base(), chat), population.store)
    population.ledger.join(name, settings.run.takeover_s)
    return Controller(settings, population.ledger, engine, chat, score_here)


@pytest.fixture
def shared(settings: Settings) -> Settings:
    run = dataclasses.replace(settings.run, takeover_s=0.8, pipelined=True)
    scheduler = dataclasses.replace(settings.scheduler, max_adapters_per_wave=2, slots=6)
    evaluation = dataclasses.replace(settings.evaluation, every_waves=1000)
    return dataclasses.replace(
        settings, run=run, scheduler=scheduler, evaluation=evaluation, partitions=4
    )


def test_two_controllers_share_the_partitions_and_one_takes_over_when_the_other_dies(
    shared: Settings,
) -> None:
    store = MemoryStore()
    Population.create(store, shared).enqueue_many(experience(shared, num_users=16, num_tasks=4))
    takeover_s = shared.run.takeover_s
    first = controller_of(Population.open(store, shared), "a")
    wait_until(
        lambda: len(first.ledger.rebalance(takeover_s, first.withdraw)[0]) == 4,
        "the first one takes all",
    )
    assert first.run_once() is not None
    second = controller_of(Population.open(store, shared), "b")

    def settled() -> bool:
        for controller in (first, second):
            controller.planner.suspect_unfinished(
                controller.ledger.rebalance(takeover_s, controller.withdraw)[0]
            )
        return len(first.ledger.owned()) == len(second.ledger.owned()) == 2

    wait_until(settled, "they share")
    assert not set(first.ledger.owned()) & set(second.ledger.owned())
    assert first.run_once() is not None and second.run_once() is not None
    with pytest.raises(OwnerAlive, match=r"under another name: run\.controller=NAME"):
        controller_of(Population.open(store, shared), "b")
    second.ledger._heartbeat.stop()  # type: ignore[union-attr]  # as dead as a killed process
    wait_until(
        lambda: (
            bool(
                first.planner.suspect_unfinished(
                    first.ledger.rebalance(takeover_s, first.withdraw)[0]
                )
            )
            or len(first.ledger.owned()) == 4
        ),
        "the living one takes over",
    )
    for _ in range(200):
        if first.run_once() is None:
            break
    first.withdraw()
    assert account(Population.open(store, shared)).is_exact()
    first.ledger.release()
    assert not any(Population.open(store, shared).ledger.catalog.owned.values())


def test_what_was_just_claimed_is_not_nobodys(settings: Settings) -> None:
    """Also to who has seen only that the one before released it."""
    store = MemoryStore()
    population = Population.create(store, settings)
    ledgers = [Ledger(store, population.meta) for _ in range(2)]
    first, second = ledgers
    first.claim(4.0)
    first.release()
    for name, ledger in zip("ab", ledgers, strict=True):
        ledger.join(name, 4.0)
    wait_until(
        lambda: bool(second._heartbeat and second._heartbeat.seen.get("test/owners/0.json")),
        "a look",
    )
    assert second._heartbeat is not None and first._heartbeat is not None
    second._heartbeat.stop()  # no later look, however slow this machine is
    claims, _ = first.rebalance(4.0, lambda: None)
    assert 0 in claims
    second.follow()
    assert second._heartbeat.seen["test/owners/0.json"].owner != first._heartbeat.owner, (
        "its look is older"
    )
    assert second._heartbeat.holder(0, second._claims.get(0), 4.0) == first._heartbeat.owner
    assert second._heartbeat.holder(0, second._claims.get(0), 0.0) is None, (
        "who claimed and died gives no sign"
    )
    for ledger in ledgers:
        ledger.release()


def test_a_release_that_fails_leaves_no_sign_of_life(settings: Settings) -> None:
    store = MemoryStore()
    population = Population.create(store, settings)
    ledger, create = Ledger(store, population.meta), store.create
    ledger.claim(0.2)

    def away(key: str, body: bytes) -> None:
        raise StoreUnavailable("away")

    store.create = away  # type: ignore[method-assign]
    with mock.patch("time.sleep"), pytest.raises(OutcomeUnknown):
        ledger.release()
    store.create = create  # type: ignore[method-assign]
    assert ledger._heartbeat is None
    other = Ledger(store, population.meta)
    other.claim(0.4)
    other.release()
