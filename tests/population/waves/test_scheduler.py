"""Who is served: budgets, fairness between tenants, and nobody waiting for ever."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from populace.configs.schema import SchedulerSettings, Settings, TenantSettings
from populace.population.experience.pending import Candidates
from populace.population.tools.simulate import Load, jain, simulate
from populace.population.waves.scheduler import Choice, Served, form_wave
from populace.storage.errors import InvalidInput

user = st.tuples(
    st.floats(0, 100), st.integers(1, 9), st.integers(1, 50), st.integers(0, 2), st.integers(1, 8),
    st.booleans(),
)  # fmt: skip
users = st.lists(user, max_size=30)
Row = tuple[float, int, int, int, int, bool]
LOAD_PER_RANK = 5e6
weights = st.lists(st.floats(0.01, 100), min_size=3, max_size=3)


def candidates_of(rows: list[Row]) -> Candidates:
    since, events, tokens, tenant, rank, hot = zip(*rows, strict=True) if rows else ((),) * 6
    return Candidates(
        row_U=np.arange(len(rows)),
        since=np.array(since, np.float64),
        num_events=np.array(events, np.uint32),
        tokens=np.array(tokens, np.uint32),
        tenant=np.array(tenant, np.uint16),
        rank=np.array(rank, np.uint32),
        is_hot=np.array(hot, bool),
        updated=np.full(len(rows), -np.inf),
        load_bytes_per_rank=LOAD_PER_RANK,
    )


def limits(
    max_adapters: int, weight: Sequence[float] = (1.0, 1.0, 1.0), **more: Any
) -> SchedulerSettings:
    """Settings without bonuses, of three tenants."""
    bare: dict[str, Any] = {
        "events_per_update": 4,
        "residency_bonus_s": 0.0,
        "evidence_bonus_s": 0.0,
        "max_adapters_per_wave": max_adapters,
        "weight": weight[0],
        "tenants": {f"t{n}": TenantSettings(weight=own) for n, own in enumerate(weight[1:], 1)},
    }
    return SchedulerSettings(**{**bare, **more})


@given(
    users, weights, st.integers(1, 8), st.integers(50, 120), st.integers(8, 30), st.integers(40, 90)
)
def test_no_budget_is_ever_exceeded_and_a_wave_is_never_empty_without_need(
    rows: list[Row],
    weight: list[float],
    max_adapters: int,
    max_tokens: int,
    max_rank: int,
    max_load: int,
) -> None:
    own = limits(
        max_adapters,
        weight,
        max_tokens_per_wave=max_tokens,
        max_rank_per_wave=max_rank,
        max_load_mb_per_wave=max_load,
    )
    candidates = candidates_of(rows)
    choice = form_wave(candidates, own, Served.nothing(3), 100.0)
    chosen = choice.chosen
    assert len(set(chosen.tolist())) == len(chosen) <= max_adapters
    assert candidates.tokens[chosen].sum() <= max_tokens
    assert candidates.rank[chosen].sum() <= max_rank
    cold = candidates.rank[chosen][~candidates.is_hot[chosen]]
    assert cold.sum() * LOAD_PER_RANK <= max_load * 1e6
    assert len(chosen) > 0 or not rows
    assert choice.was_cut == (len(chosen) < len(rows))


@given(users, weights)
def test_the_same_inputs_give_the_same_wave(rows: list[Row], weight: list[float]) -> None:
    own = limits(5, weight, max_tokens_per_wave=90, residency_bonus_s=3)
    served = Served(time_G=np.array([0.0, 0.5, 0.1]))
    first, again = (form_wave(candidates_of(rows), own, served, 100.0) for _ in range(2))
    assert first.chosen.tolist() == again.chosen.tolist()
    assert first.served.time_G.tolist() == again.served.time_G.tolist()


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40, unique=True), st.integers(1, 10))
def test_within_a_tenant_the_longest_waiting_go_first(
    since: list[float], max_adapters: int
) -> None:
    rows = [(value, 4, 1, 0, 1, False) for value in since]
    choice = form_wave(candidates_of(rows), limits(max_adapters), Served.nothing(3), 100.0)
    assert [since[index] for index in choice.chosen] == sorted(since)[:max_adapters]


def serve_for_ever(
    demands: list[tuple[int, int, int]], own: SchedulerSettings, num_waves: int
) -> list[list[int]]:
    """Users who always have more: (tenant, tokens, rank) each. Returns the waves that served each
    of them."""
    since, served = np.arange(len(demands)) * 1e-3, Served.nothing(3)
    turns: list[list[int]] = [[] for _ in demands]
    for number in range(num_waves):
        now = 1.0 + number
        rows = [
            (float(since[index]), 99, tokens, tenant, rank, index % 3 == 0)
            for index, (tenant, tokens, rank) in enumerate(demands)
        ]
        choice: Choice = form_wave(candidates_of(rows), own, served, now)
        served = choice.served
        for index in choice.chosen.tolist():
            since[index] = now + index * 1e-3
            turns[index].append(number)
    return turns


@settings(max_examples=60, deadline=None)
@given(
    weights,
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 50), st.integers(1, 8)), min_size=2, max_size=25
    ),
    st.integers(1, 6),
    st.floats(0, 5),
)
def test_nobody_starves_whatever_the_weights_sizes_and_bonuses(
    weight: list[float], demands: list[tuple[int, int, int]], max_adapters: int, bonus_s: float
) -> None:
    """The wait between two turns is bounded by what stands before one in line and by one's tenant's
    share."""
    own = limits(
        max_adapters,
        weight,
        max_tokens_per_wave=50,
        max_load_mb_per_wave=40,
        residency_bonus_s=bonus_s,
        evidence_bonus_s=bonus_s,
    )
    # One user costs a wave at most, so a tenant of share w gets a wave's worth at least every 1/w
    # waves, and a user of it has all others of the tenant before it at most, and those once more
    # that bonuses let pass. Twice that: users that don't fit beside the others wait until they are
    # first of all, and a tenant that was ahead pays back.
    present = {tenant for tenant, _, _ in demands}
    shares = {
        tenant: weight[tenant] / sum(weight[other] for other in present) for tenant in present
    }
    counts = {tenant: sum(item[0] == tenant for item in demands) for tenant in present}
    bound = {
        t: int(2 * (counts[t] + 2) / shares[t] * (1 + 2 * bonus_s / max(1.0, counts[t]))) + 3
        for t in present
    }
    num_waves = min(4000, 3 * max(bound.values()) + 10)
    turns = serve_for_ever(demands, own, num_waves)
    for (tenant, _, _), own_turns in zip(demands, turns, strict=True):
        gaps = [after - before for before, after in itertools.pairwise([-1, *own_turns, num_waves])]
        assert max(gaps) <= bound[tenant], (tenant, max(gaps), bound[tenant])


def test_who_needs_more_than_a_budget_is_served_alone_and_blocks_nobody_for_ever() -> None:
    rows = [(0.0, 4, 1000, 0, 900, False), (1.0, 4, 10, 0, 1, False), (2.0, 4, 10, 1, 1, False)]
    own = limits(4, max_tokens_per_wave=90, max_rank_per_wave=30, max_load_mb_per_wave=60.0)
    served, waves = Served.nothing(3), []
    for _ in range(20):
        choice = form_wave(candidates_of(rows), own, served, 100.0)
        served, waves = choice.served, [*waves, choice.chosen.tolist()]
    assert [0] in waves and [2] in waves and not any(0 in wave and len(wave) > 1 for wave in waves)


def test_a_hot_adapter_goes_first_only_for_so_long() -> None:
    own = limits(1, residency_bonus_s=5.0)
    for waited, first in ((4.0, 1), (6.0, 0)):
        rows = [(10.0, 4, 1, 0, 1, False), (10.0 + waited, 4, 1, 0, 1, True)]
        choice = form_wave(candidates_of(rows), own, Served.nothing(3), 100.0)
        assert choice.chosen.tolist() == [first]


def test_users_wait_for_enough_evidence_but_not_longer_than_their_patience() -> None:
    own = limits(9, min_events=3, patience_s=60.0)
    rows = [(90.0, 2, 1, 0, 1, False), (30.0, 2, 1, 0, 1, False), (99.0, 3, 1, 0, 1, False)]
    choice = form_wave(candidates_of(rows), own, Served.nothing(3), 100.0)
    assert sorted(choice.chosen.tolist()) == [1, 2]


def test_users_cool_down_between_updates() -> None:
    candidates = dataclasses.replace(
        candidates_of([(1.0, 4, 1, 0, 1, False)] * 2), updated=np.array([95.0, 80.0])
    )
    choice = form_wave(candidates, limits(9, cool_down_s=10.0), Served.nothing(3), 100.0)
    assert choice.chosen.tolist() == [1]


def test_an_idle_tenant_saves_up_no_credit() -> None:
    own = limits(2)
    served = Served.nothing(3)
    alone = [(float(n), 4, 1, 0, 1, False) for n in range(8)]
    for _ in range(50):
        served = form_wave(candidates_of(alone), own, served, 100.0).served
    both = alone + [(50.0 + n, 4, 1, 1, 1, False) for n in range(8)]
    choice = form_wave(candidates_of(both), own, served, 100.0)
    tenants = candidates_of(both).tenant[choice.chosen]
    assert sorted(tenants.tolist()) == [0, 1], "half each, from the first wave on"


def simulation(
    weights: tuple[float, ...], shares: tuple[float, ...], rate: float, bonus_s: float = 2.0
) -> object:
    scheduler = SchedulerSettings(
        weight=weights[0],
        residency_bonus_s=bonus_s,
        evidence_bonus_s=bonus_s,
        tenants={
            f"t{number}": TenantSettings(weight=weight)
            for number, weight in enumerate(weights[1:], 1)
        },
    )
    load = Load(users=600, events_per_s=rate, hours=0.1, shares=shares, seed=3)
    return simulate(load, Settings(scheduler=scheduler))


def test_equal_tenants_get_equal_shares_under_a_flood_of_a_hundred_to_one() -> None:
    report = simulation((1.0, 1.0), (100.0, 1.0), rate=5000)
    assert report.fairness >= 0.99  # type: ignore[attr-defined]
    flood, other = report.tenants  # type: ignore[attr-defined]
    assert other.served > 0.45 * (flood.served + other.served)


def test_a_tenant_that_asks_for_less_than_its_share_waits_only_for_the_next_waves() -> None:
    report = simulation((1.0, 1.0), (1000.0, 1.0), rate=5000)
    flood, other = report.tenants  # type: ignore[attr-defined]
    assert other.wait_99_s <= 3.0 < flood.wait_99_s and other.waiting < 20


def test_weights_share_the_waves() -> None:
    report = simulation((1.0, 3.0), (1.0, 1.0), rate=2000)
    one, three = report.tenants  # type: ignore[attr-defined]
    assert 2.9 < three.served / one.served < 3.1
    assert report.fairness > 0.999  # type: ignore[attr-defined]


def test_jains_index_is_one_for_equal_shares_and_one_nth_for_one_who_has_all() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([9.0, 0.0, 0.0]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": 0}, "users is 0"),
        ({"day_amplitude": 2.0}, "day_amplitude is 2.0"),
        ({"shares": (1.0, 0.0)}, "share"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        simulate(Load(**changes), Settings())  # type: ignore[arg-type]
