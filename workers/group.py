"""The shard group: the actors that together hold one base. One shard for now; callers see a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from populace.storage.errors import PopulaceError
from populace.workers.batch import (
    AdapterKey,
    AdapterRef,
    Floats,
    RolloutGroup,
    RolloutRequest,
    StepResult,
    WaveBatch,
)
from populace.workers.engine import ShardSettings
from populace.workers.layout import BaseDims
from populace.workers.shard import RemoteShard


class ShardGroupLost(PopulaceError):
    """A shard died: the group is gone as one. Start it again; nothing that was committed is lost."""


class ShardGroup:
    """The methods of `ShardEngine`, on Ray actors."""

    def __init__(self, settings: ShardSettings) -> None:
        # Huge pages: a pass allocates and frees gigabytes, and faulting them in by 4 KiB costs a quarter of it.
        environment = {"env_vars": {"THP_MEM_ALLOC_ENABLE": "1"}}
        # num_cpus=1 leaves room for reward tasks; the shard's threads are its own setting.
        options = RemoteShard.options(num_cpus=1, runtime_env=environment)
        self._shards = [options.remote(settings)]

    def wait_until_ready(self, tick: Callable[[], None] | None = None) -> None:
        """Return once every shard has loaded its part; calls `tick` twice a second meanwhile."""
        waiting = [shard.ping.remote() for shard in self._shards]
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.5)
            self._get(ready)
            if tick is not None:
                tick()

    def describe(self) -> tuple[BaseDims, dict[str, str]]:
        description: tuple[BaseDims, dict[str, str]] = self._first("describe")
        return description

    def page_in(self, refs: Sequence[AdapterRef], with_moments: bool) -> int:
        return int(self._first("page_in", refs, with_moments))

    def evict(self, keys: Sequence[AdapterKey]) -> None:
        self._all("evict", keys)

    def committed(self, pairs: Sequence[tuple[AdapterKey, AdapterKey]]) -> None:
        self._all("committed", pairs)

    def forget(self, pseudonyms: Sequence[str]) -> None:
        self._all("forget", pseudonyms)

    def num_hot(self) -> int:
        return int(self._first("num_hot"))

    def roll_out(self, requests: Sequence[RolloutRequest]) -> list[RolloutGroup]:
        groups: list[RolloutGroup] = self._first("roll_out", requests)
        return groups

    def score_base(self, groups: Sequence[RolloutGroup]) -> list[tuple[Floats, ...]]:
        scores: list[tuple[Floats, ...]] = self._first("score_base", groups)
        return scores

    def train_wave(self, batch: WaveBatch) -> StepResult:
        result: StepResult = self._first("train_wave", batch)
        return result

    def stop(self) -> None:
        for shard in self._shards:
            ray.kill(shard)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._get([getattr(shard, method).remote(*arguments) for shard in self._shards])

    def _first(self, method: str, *arguments: Any) -> Any:
        """Every shard runs it; their answers are the same."""
        return self._all(method, *arguments)[0]

    def _get(self, references: Sequence[Any]) -> list[Any]:
        try:
            answers: list[Any] = ray.get(list(references))
            return answers
        except RayActorError as error:
            raise ShardGroupLost(f"a shard died ({error}); start the run again, it continues") from error
