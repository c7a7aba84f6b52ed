"""How many controllers a run gets. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from populace.configs.schema import AUTO, Settings
from populace.storage.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """The controllers of a run, the leader first."""

    settings: tuple[Settings, ...]
    gpus: int
    """That Ray reserves for each of their shards."""


def plan_team(settings: Settings, partitions: int, gpus: float) -> Team:
    """How many controllers a run gets, and who of them does how many of its waves. `gpus`: of the
    cluster, free for this run. `InvalidInput` where somebody would have no partition."""
    shard, run, device = settings.shard, settings.run, settings.base.device
    own_gpus = int(device == "cuda" or (device == AUTO and gpus >= shard.count))
    count, by_whom = shard.replicas, "shard.replicas is"
    if isinstance(count, str):
        count = max(1, int(gpus // shard.count)) if own_gpus else 1
        by_whom += f" auto, and {gpus:g} GPUs for shard.count={shard.count} make that"
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
    )
