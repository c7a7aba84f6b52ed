"""Controllers that share a population: everybody gets a fair part, and who dies is replaced."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.ledger.ownership import Ownership
from populace.population.ledger.sharing import share_out
from populace.storage.errors import OutcomeUnknown, OwnerAlive, StoreUnavailable
from populace.storage.objects.cloud import MemoryStore
from tests.support.accounting import account
from tests.support.loops import Loop, chat_of, engine_of, ledger_of, owned_ledger
from tests.support.streams import experience, wait_until

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


def controller_of(population: Population, name: str) -> Loop:
    population.ownership.join(name, population.settings.run.takeover_s)
    return Loop(population, engine_of(population), chat_of(population))


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
        lambda: len(first.ownership.rebalance(takeover_s, first.take_back)[0]) == 4,
        "the first one takes all",
    )
    assert first.wave() is not None
    second = controller_of(Population.open(store, shared), "b")

    def settled() -> bool:
        for controller in (first, second):
            controller.planner.suspects.suspect_unfinished(
                controller.ownership.rebalance(takeover_s, controller.take_back)[0]
            )
        return len(first.ledger.owned()) == len(second.ledger.owned()) == 2

    wait_until(settled, "they share")
    assert not set(first.ledger.owned()) & set(second.ledger.owned())
    assert first.wave() is not None and second.wave() is not None
    with pytest.raises(OwnerAlive, match=r"under another name: run\.controller=NAME"):
        controller_of(Population.open(store, shared), "b")
    second.ownership._heartbeat.stop()  # type: ignore[union-attr]  # as dead as a killed process

    def takes_over() -> bool:
        claims, _ = first.ownership.rebalance(takeover_s, first.take_back)
        first.planner.suspects.suspect_unfinished(claims)
        return len(first.ledger.owned()) == 4

    wait_until(takes_over, "the living one takes over")
    for _ in range(200):
        if first.wave() is None:
            break
    first.take_back()
    assert account(Population.open(store, shared)).is_exact()
    first.ownership.release()
    assert not any(Population.open(store, shared).ledger.catalog.owned.values())


def test_what_was_just_claimed_is_not_nobodys(settings: Settings) -> None:
    """Also to who has seen only that the one before released it."""
    store = MemoryStore()
    population = Population.create(store, settings)
    owning = [Ownership(ledger_of(store, population.meta)) for _ in range(2)]
    first, second = owning
    first.claim(4.0)
    first.release()
    for name, ownership in zip("ab", owning, strict=True):
        ownership.join(name, 4.0)
    wait_until(
        lambda: all(
            second._heartbeat and f"test/owners/{partition}.json" in second._heartbeat.seen
            for partition in range(2)
        ),
        "a look",
    )
    assert second._heartbeat is not None and first._heartbeat is not None
    second._heartbeat.stop()  # no later look, however slow this machine is
    claims, _ = first.rebalance(4.0, lambda: None)
    assert claims
    second.ledger.follow()
    claimed, claim = claims[0], second.ledger.claims.get(claims[0])
    beat, owner = second._heartbeat, first._heartbeat.owner
    assert beat.seen[f"test/owners/{claimed}.json"].owner != owner, "its look is older"
    assert beat.holder(claimed, claim, 4.0) == owner
    assert beat.holder(claimed, claim, 0.0) is None, "who claimed and died gives no sign"
    for ownership in owning:
        ownership.release()


def test_a_release_that_fails_leaves_no_sign_of_life(settings: Settings) -> None:
    store = MemoryStore()
    population = Population.create(store, settings)
    (_, ownership), create = owned_ledger(store, population.meta, 0.2), store.create

    def away(key: str, body: bytes) -> None:
        raise StoreUnavailable("away")

    store.create = away  # type: ignore[method-assign]
    with mock.patch("time.sleep"), pytest.raises(OutcomeUnknown):
        ownership.release()
    store.create = create  # type: ignore[method-assign]
    assert ownership._heartbeat is None
    _, owning = owned_ledger(store, population.meta, 0.4)
    owning.release()
