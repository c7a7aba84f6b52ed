"""Who belongs to a run that has several groups, and when it is over. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from populace.configs.schema import AUTO, Settings
from populace.population.ledger.heartbeat import UNKNOWN
from populace.storage.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """The controllers of a run, the leader first."""

    settings: tuple[Settings, ...]
    gpus: int
    """That Ray reserves for each of their shards."""
    remark: str = ""
    """What somebody who has GPUs may want to know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a controller said since it was asked last, and what is true of it.

    Example: `News(said=(("stage", ("loading",)),), is_ready=False)`."""

    said: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Hooks of a `View` with their arguments."""
    is_ready: bool = False
    """Its group is loaded."""
    is_idle: bool = False
    """It has nothing to learn from."""
    owner: str = ""
    """Its name among the holders of partitions."""
    partitions: frozenset[int] = frozenset()
    """It owns."""


def plan_team(settings: Settings, partitions: int, gpus: float, cpus: float) -> Team:
    """How many controllers a run gets, and who of them does how many of its waves. `gpus`, `cpus`:
    of the cluster, free for this run. `InvalidInput` where somebody would have no partition."""
    shard, run, device = settings.shard, settings.run, settings.base.device
    asked = 1 if isinstance(shard.replicas, str) else shard.replicas
    has_gpus = gpus >= asked * shard.count
    own_gpus = int(device == "cuda" or (device == AUTO and has_gpus))
    count, by_whom, remark = asked, "shard.replicas is", ""
    if isinstance(shard.replicas, str) and own_gpus:
        by_gpus, by_cpus = int(gpus // shard.count), int(cpus // (shard.cpus * shard.count))
        count = max(1, min(by_gpus, by_cpus))
        by_whom += f" auto, and {gpus:g} GPUs for shard.count={shard.count} make that"
        if count < by_gpus:
            remark = (
                f"{by_gpus} groups would have GPUs, but shard.cpus={shard.cpus:g} leaves CPUs for "
                f"{count}; lower it to use them all"
            )
    if device == AUTO and gpus and not has_gpus:
        remark = f"{gpus:g} GPUs are too few for {asked * shard.count} shards: they get CPUs"
    if count > partitions:
        raise InvalidInput(
            f"{by_whom} {count}: groups share the population's users by partition, and it was "
            f"created with {partitions}; set shard.replicas={partitions} or less, or create a "
            f"population with partitions={max(16, 2 * count)}"
        )
    if run.max_waves is not None:
        count = max(1, min(count, run.max_waves))
    return Team(
        settings=tuple(
            replace(
                settings,
                run=replace(
                    run,
                    controller=run.controller if number == 0 else f"{run.controller}.{number}",
                    max_waves=None
                    if run.max_waves is None
                    else run.max_waves // count + (number < run.max_waves % count),
                ),
            )
            for number in range(count)
        ),
        gpus=own_gpus,
        remark=remark,
    )


def are_all_idle(
    living: Sequence[News],
    owned: Collection[int],
    holders: Mapping[int, str | None],
    followers: Collection[str],
) -> bool:
    """Whether a run whose leader is idle is over. `living`: followers that haven't ended; `owned`:
    the leader's partitions; `holders`: see `Ownership.holders`; `followers`: all that there ever
    were, by their names there.

    Every partition has to be with somebody of the run who is idle and has said so, or with a
    controller that isn't the run's: one on its way from one to another keeps the run going."""
    if not all(news.is_idle for news in living):
        return False
    ours = frozenset(owned).union(*(news.partitions for news in living))
    nobodys = {None, UNKNOWN, *followers}
    return all(partition in ours or holder not in nobodys for partition, holder in holders.items())
