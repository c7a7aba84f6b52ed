"""The shard group: the actors that together hold one base. It is placed, loaded, called, fails and starts again as one.

The actors are detached and named `<population>/shard-<rank>` in the namespace `populace`: a controller that takes over
from a dead one goes on with them instead of loading the base again. Only the owner of a population may start its group.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import PlacementGroupID
from ray.actor import ActorHandle
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, RayActorError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from populace.configs.schema import GroupSettings
from populace.storage.errors import InvalidInput, PopulaceError
from populace.workers.batch import (
    AdapterKey,
    AdapterRef,
    Floats,
    RolloutGroup,
    RolloutRequest,
    StepResult,
    WaveBatch,
    join_steps,
)
from populace.workers.engine import ShardSettings, join_shares
from populace.workers.exchange import ExchangeBroken
from populace.workers.layout import BaseDims
from populace.workers.shard import RemoteShard

NAMESPACE = "populace"
_ATTACH_TIMEOUT_S = 10.0
_STRAGGLER_TIMEOUT_S = 10.0
logger = logging.getLogger(__name__)


class ShardGroupLost(PopulaceError):
    """A shard died and took the group with it. `start_again` brings it back; nothing that was committed is lost."""


class ShardGroup:
    """The methods of `ShardEngine`, on Ray actors."""

    def __init__(self, settings: ShardSettings, group: GroupSettings) -> None:
        self.settings, self.group = replace(settings, num_shards=group.count, dense=group.dense), group
        self.num_restarts = 0
        self._shards: list[ActorHandle] = []
        self._places: PlacementGroup | None = None
        self._loading: list[Any] = []
        if not self._attach():
            self._place()

    def wait_until_ready(self, tick: Callable[[int, int], None] | None = None) -> None:
        """Return once every shard has loaded its part; calls `tick(loaded, shards)` twice a second meanwhile.
        `InvalidInput` if the cluster has no room for the group."""
        self._wait_for_places(tick)
        if not self._shards:
            self._create()
        waiting = self._loading
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.5)
            self._get(ready)
            if tick is not None:
                tick(len(self._loading) - len(waiting), len(self._loading))

    def start_again(self, tick: Callable[[int, int], None] | None = None) -> None:
        """After `ShardGroupLost`: a new group in its place, with nothing hot. Raises it itself once it was
        started `shard.max_restarts` times without a wave that was trained in between."""
        self.num_restarts += 1
        if self.num_restarts > self.group.max_restarts:
            raise ShardGroupLost(
                f"the shard group was started again {self.group.max_restarts} times in a row and died each time; "
                "its actors' logs in the Ray dashboard say why; start the run again then, it continues"
            )
        self._discard()
        self._place()
        self.wait_until_ready(tick)

    def describe(self) -> tuple[BaseDims, dict[str, str]]:
        """Of the base, and the numerics fingerprint; bits are promised where every shard promises them."""
        descriptions: list[tuple[BaseDims, dict[str, str]]] = self._all("describe")
        dims, numerics = descriptions[0]
        if any(other["numerics"] == "fast" for _, other in descriptions):
            numerics = {**numerics, "numerics": "fast"}
        return dims, numerics

    def page_in(self, refs: Sequence[AdapterRef], with_moments: bool) -> int:
        return int(self._all("page_in", refs, with_moments)[0])

    def evict(self, keys: Sequence[AdapterKey]) -> None:
        self._all("evict", keys)

    def committed(self, pairs: Sequence[tuple[AdapterKey, AdapterKey]]) -> None:
        self._all("committed", pairs)

    def forget(self, pseudonyms: Sequence[str]) -> None:
        self._all("forget", pseudonyms)

    def num_hot(self) -> int:
        return int(self._all("num_hot")[0])

    def roll_out(self, requests: Sequence[RolloutRequest]) -> list[RolloutGroup]:
        return join_shares(self._all("roll_out_share", requests))

    def score_base(self, groups: Sequence[RolloutGroup]) -> list[tuple[Floats, ...]]:
        return join_shares(self._all("score_base_share", groups))

    def train_wave(self, batch: WaveBatch) -> StepResult:
        result = join_steps(self._all("train_share", batch))
        self.num_restarts = 0
        return result

    def stop(self) -> None:
        self._discard()

    def _name(self, rank: int) -> str:
        return f"{self.settings.population}/shard-{rank}"

    def _attach(self) -> bool:
        """Go on with the actors of a controller that died, if they are what this one would start; else remove them."""
        names = ray.util.list_named_actors(all_namespaces=True)
        prefix = f"{self.settings.population}/shard-"
        found = sorted(
            item["name"] for item in names if item["namespace"] == NAMESPACE and item["name"].startswith(prefix)
        )
        shards = [ray.get_actor(name, namespace=NAMESPACE) for name in found]
        if found == sorted(map(self._name, range(self.group.count))):
            shards = [ray.get_actor(self._name(rank), namespace=NAMESPACE) for rank in range(self.group.count)]
            try:
                answers = [shard.is_loaded_with.remote(self.settings) for shard in shards]
                if all(ray.get(answers, timeout=_ATTACH_TIMEOUT_S)):
                    ray.get([shard.reset.remote() for shard in shards], timeout=_ATTACH_TIMEOUT_S)
                    self._shards = shards
                    return True
            except (RayActorError, GetTimeoutError) as error:
                logger.warning("the shards of an earlier run don't answer (%s); starting new ones", error)
        for shard in shards:
            ray.kill(shard)
        for name, places in _placement_groups():
            if name == prefix:
                remove_placement_group(places)
        return False

    def _place(self) -> None:
        """Ask for room: one bundle per shard, on as many nodes as there are."""
        bundles = [{"CPU": self.group.cpus} for _ in range(self.group.count)]
        name = f"{self.settings.population}/shard-"
        self._places = placement_group(bundles, strategy="SPREAD", lifetime="detached", name=name)

    def _wait_for_places(self, tick: Callable[[int, int], None] | None) -> None:
        if self._places is None or self._shards:
            return
        deadline, placed = time.monotonic() + self.group.place_timeout_s, self._places.ready()
        while not ray.wait([placed], timeout=0.5)[0]:
            if tick is not None:
                tick(0, self.group.count)
            if time.monotonic() > deadline:
                free = ray.available_resources().get("CPU", 0.0)
                raise InvalidInput(
                    f"shard.count is {self.group.count} and shard.cpus is {self.group.cpus}, but the cluster has "
                    f"{free:g} CPUs free; add nodes, lower one of the two, or raise shard.place_timeout_s"
                )

    def _create(self) -> None:
        # Huge pages: a pass allocates and frees gigabytes, and faulting them in by 4 KiB costs a quarter of it.
        environment = {"env_vars": {"THP_MEM_ALLOC_ENABLE": "1"}}
        for rank in range(self.group.count):
            place = PlacementGroupSchedulingStrategy(self._places, placement_group_bundle_index=rank)
            options = RemoteShard.options(
                name=self._name(rank), namespace=NAMESPACE, lifetime="detached", num_cpus=self.group.cpus,
                scheduling_strategy=place, runtime_env=environment,
            )  # fmt: skip
            self._shards.append(options.remote(self.settings, rank))
        rendezvous = None
        if self.group.count > 1:
            (rendezvous,) = self._get([self._shards[0].rendezvous.remote(self.group.timeout_s)])
        self._loading = [shard.load.remote(rendezvous) for shard in self._shards]

    def _discard(self) -> None:
        for shard in self._shards:
            ray.kill(shard)
        if self._places is not None:
            remove_placement_group(self._places)
        self._shards, self._places, self._loading = [], None, []

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """Every shard runs it; they need each other for most."""
        shared = [ray.put(argument) for argument in arguments]
        return self._get([getattr(shard, method).remote(*shared) for shard in self._shards])

    def _get(self, references: Sequence[Any]) -> list[Any]:
        """All answers, or the first error: at once, because after it the others may wait for ever."""
        waiting = list(references)
        try:
            while waiting:
                ready, waiting = ray.wait(waiting, num_returns=1)
                ray.get(ready)
            answers: list[Any] = ray.get(list(references))
            return answers
        except (RayActorError, ActorUnschedulableError, ExchangeBroken) as error:
            reason = str(error).strip().splitlines()
            raise ShardGroupLost(f"a shard died: {reason[-1].strip() if reason else type(error).__name__}") from error
        except Exception:
            # One shard refused. Where the others went on, slots no longer agree: nothing stays hot.
            _, late = ray.wait(waiting, num_returns=len(waiting), timeout=_STRAGGLER_TIMEOUT_S) if waiting else ([], [])
            if late:
                raise ShardGroupLost("a shard refused what the others wait for") from None
            if len(references) > 1:
                ray.get([shard.reset.remote() for shard in self._shards])
            raise


def _placement_groups() -> list[tuple[str, PlacementGroup]]:
    """Names and handles of those that are not removed, in all namespaces."""
    return [
        (item["name"], PlacementGroup(PlacementGroupID.from_hex(identity)))
        for identity, item in placement_group_table().items()
        if item["state"] != "REMOVED"
    ]
