"""How many controllers a run gets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from populace.configs.load import load_settings
from populace.configs.schema import BaseSettings, GroupSettings, RunSettings, Settings
from populace.population.ledger.heartbeat import UNKNOWN
from populace.population.replicas.team import News, Team, are_all_idle, plan_team
from populace.storage.errors import InvalidInput


def team(
    gpus: float,
    *,
    device: str = "auto",
    partitions: int = 16,
    waves: int | None = None,
    free_cpus: float = 64.0,
    **shard: object,
) -> Team:
    settings = Settings(
        base=BaseSettings(device=device),
        shard=GroupSettings(**shard),  # type: ignore[arg-type]
        run=RunSettings(max_waves=waves, controller="night"),
    )
    return plan_team(settings, partitions, gpus, free_cpus)


@pytest.mark.parametrize(
    ("gpus", "asked", "groups", "of_each"),
    [
        (0, {}, 1, 0),
        (1, {}, 1, 1),
        (8, {}, 8, 1),
        (8, {"device": "cpu"}, 1, 0),
        (8, {"count": 4}, 2, 1),
        (7, {"count": 4}, 1, 1),
        (3, {"count": 4}, 1, 0),
        (3, {"count": 4, "device": "cuda"}, 1, 1),
        (0, {"device": "cuda"}, 1, 1),
        (0, {"replicas": 3}, 3, 0),
        (8, {"replicas": 3}, 3, 1),
        (8, {"replicas": 1}, 1, 1),
        (1, {"replicas": 3}, 3, 0),
        (1, {"replicas": 3, "device": "cuda"}, 3, 1),
        (8, {"cpus": 16}, 4, 1),
        (8, {"cpus": 100}, 1, 1),
        (0.5, {}, 1, 0),
    ],
)
def test_there_are_as_many_groups_as_gpus_for_them(
    gpus: float, asked: dict[str, object], groups: int, of_each: int
) -> None:
    found = team(gpus, **asked)  # type: ignore[arg-type]
    assert (len(found.settings), found.gpus) == (groups, of_each)


def test_gpus_that_stay_idle_are_said_to() -> None:
    assert team(8).remark == team(0).remark == team(8, device="cpu").remark == ""
    assert team(1, replicas=3).remark == "1 GPUs are too few for 3 shards: they get CPUs"
    assert "shard.cpus=16 leaves CPUs for 4; lower it" in team(8, cpus=16).remark


def test_they_have_names_of_their_own_and_share_the_runs_waves() -> None:
    found = team(8, waves=19)
    assert [own.run.controller for own in found.settings[:3]] == ["night", "night.1", "night.2"]
    shares = [own.run.max_waves for own in found.settings]
    assert shares == [3, 3, 3, 2, 2, 2, 2, 2] and len(set(map(str, found.settings))) == 8
    assert [own.run.max_waves for own in team(8, waves=2).settings] == [1, 1]
    assert [own.run.max_waves for own in team(8, waves=0).settings] == [0]
    assert {own.run.max_waves for own in team(8).settings} == {None}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, r"shard.replicas is auto, and 8 GPUs for shard.count=1 make that 8: .* with 4; set "),
        ({"replicas": 5}, r"shard.replicas is 5: .*partitions=16"),
        ({"replicas": 20, "partitions": 16}, r"with 16; .* population with partitions=40"),
    ],
)
def test_nobody_goes_without_a_partition(asked: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        team(8, **{"partitions": 4, **asked})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["0", "-1", "two", "true", "1.5"])
def test_a_number_of_groups_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(InvalidInput, match=r"shard.replicas"):
        load_settings(None, [f"shard.replicas={value}"])
    assert load_settings(None, ["shard.replicas=3"]).shard.replicas == 3
    assert load_settings(None, ["shard.replicas=auto"]) == replace(Settings())


def idle(owner: str, *partitions: int) -> News:
    return News(is_ready=True, is_idle=True, owner=owner, partitions=frozenset(partitions))


@pytest.mark.parametrize(
    ("living", "owned", "holders", "over"),
    [
        ([idle("b", 1)], [0], {0: "a", 1: "b"}, True),
        ([replace(idle("b", 1), is_idle=False)], [0], {0: "a", 1: "b"}, False),
        # On its way: released, claimed but not said so, or not looked at yet.
        ([idle("b")], [0], {0: "a", 1: None}, False),
        ([idle("b")], [0], {0: "a", 1: "b"}, False),
        ([idle("b", 1)], [0], {0: "a", 1: "b", 2: UNKNOWN}, False),
        # Of a follower that died, until somebody takes it over.
        ([idle("b", 1)], [0], {0: "a", 1: "b", 2: "dead"}, False),
        ([idle("b", 1, 2)], [0], {0: "a", 1: "b", 2: "dead"}, True),
        # Another run's.
        ([idle("b", 1)], [0], {0: "a", 1: "b", 2: "stranger"}, True),
        ([idle("b")], [0], {0: "a", 1: "stranger"}, True),
        ([], [0, 1], {0: "a", 1: "a"}, True),
    ],
)
def test_a_run_is_over_when_everybody_is_idle_and_every_partition_is_with_somebody(
    living: list[News], owned: list[int], holders: dict[int, str | None], over: bool
) -> None:
    assert are_all_idle(living, owned, holders, {"b", "dead"}) is over


@pytest.mark.parametrize("name", ["main.1", "a.b.22"])
def test_a_controller_is_not_called_as_a_follower_is(name: str) -> None:
    with pytest.raises(InvalidInput, match=rf"run.controller is '{name}', as the other groups"):
        load_settings(None, [f"run.controller={name}"])
    assert load_settings(None, ["run.controller=v1.beta"]).run.controller == "v1.beta"
