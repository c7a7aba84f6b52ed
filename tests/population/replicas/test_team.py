"""How many controllers a run gets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from populace.configs.load import load_settings
from populace.configs.schema import BaseSettings, GroupSettings, RunSettings, Settings
from populace.population.replicas.team import Team, plan_team
from populace.storage.errors import InvalidInput


def team(
    gpus: float,
    *,
    device: str = "auto",
    partitions: int = 16,
    waves: int | None = None,
    **shard: object,
) -> Team:
    settings = Settings(
        base=BaseSettings(device=device),
        shard=GroupSettings(**shard),  # type: ignore[arg-type]
        run=RunSettings(max_waves=waves, controller="night"),
    )
    return plan_team(settings, partitions, gpus)


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
        (0.5, {}, 1, 0),
    ],
)
def test_there_are_as_many_groups_as_gpus_for_them(
    gpus: float, asked: dict[str, object], groups: int, of_each: int
) -> None:
    found = team(gpus, **asked)  # type: ignore[arg-type]
    assert (len(found.settings), found.gpus) == (groups, of_each)


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
