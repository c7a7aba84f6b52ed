"""The shard group: the actors that together hold one base. It is placed, loaded, called, fails and
starts again as one.

The actors are detached and named `<population>-<store's digest>/<controller>/shard-<rank>` in the
namespace `populace`: a controller that takes over from a dead one of its name goes on with them
instead of loading the base again. There is one controller of a name; from then on the actors obey
that group's token alone, so one that was fenced can't disturb them.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from populace.configs.schema import GroupSettings
from populace.storage.errors import InvalidInput, PopulaceError
from populace.storage.objects.counted import add_calls
from populace.workers.actors.engine import ShardSettings, join_shares
from populace.workers.actors.places import (
    NAMESPACE,
    actors_of,
    prefix_of,
    remove_group,
    remove_places,
)
from populace.workers.actors.shard import NotTheOwner, RemoteShard, versions
from populace.workers.batch import (
    AdapterKey,
    AdapterRef,
    Floats,
    Paging,
    RolloutGroup,
    RolloutRequest,
    StepResult,
    WaveBatch,
)
from populace.workers.joins import join_steps
from populace.workers.shapes import BaseDims
from populace.workers.shards.exchange import ExchangeBroken

_ATTACH_TIMEOUT_S = 10.0

_STRAGGLER_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


class ShardGroupLost(PopulaceError):
    """A shard died and took the group with it. `start_again` brings it back; nothing that was
    committed is lost."""

    is_temporary = True


class ShardGroup:
    """The methods of `ShardEngine`, on Ray actors."""

    def __init__(
        self,
        settings: ShardSettings,
        group: GroupSettings,
        controller: str = "main",
        gpus: int = 0,
    ) -> None:
        """`gpus`: that Ray reserves for each shard."""
        self.settings, self.group = (
            replace(settings, num_shards=group.count, dense=group.dense),
            group,
        )
        self.num_restarts = 0
        self._gpus = gpus
        self._token = secrets.token_hex(16)
        self._prefix = prefix_of(settings.population, settings.store_url, controller)
        self._shards: list[ActorHandle] = []
        self._places: PlacementGroup | None = None
        self._loading: list[Any] = []
        self.computes_on = ""
        """What and in which dtype; empty for a group that was found loaded."""
        if not self._attach():
            self._place()

    def wait_until_ready(self, tick: Callable[[int, int], None] | None = None) -> None:
        """Return once every shard has loaded its part; `computes_on` says then where. Calls
        `tick(loaded, shards)` twice a second meanwhile. `InvalidInput` if the cluster has no room
        for the group."""
        self._wait_for_places(tick)
        if not self._shards:
            self._create()
        waiting = self._loading
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.5)
            self._get(ready)
            if tick is not None:
                tick(len(self._loading) - len(waiting), len(self._loading))
        if self._loading:
            self.computes_on = check_devices(self._get(self._loading))

    def start_again(self, tick: Callable[[int, int], None] | None = None) -> None:
        """After `ShardGroupLost`: a new group in its place, with nothing hot; once more if it dies
        while it loads. Raises it itself once it was started `shard.max_restarts` times without a
        wave that was trained in between."""
        while True:
            self.num_restarts += 1
            if self.num_restarts > self.group.max_restarts:
                break
            self._discard()
            self._place()
            try:
                self.wait_until_ready(tick)
                return
            except ShardGroupLost as error:
                logger.warning("%s while the group was loading", error)
        raise ShardGroupLost(
            f"the shard group was started again {self.group.max_restarts} times in a row and died "
            "each time; "
            "its actors' logs in the Ray dashboard say why; start the run again then, it continues"
        )

    def describe(self) -> tuple[BaseDims, dict[str, str]]:
        """Shapes of the base, and the numerics fingerprint; bits are promised where every shard
        promises the same ones."""
        descriptions: list[tuple[BaseDims, dict[str, str]]] = self._all("describe")
        dims, numerics = descriptions[0]
        if any(other != numerics for _, other in descriptions):
            numerics = {**numerics, "numerics": "fast"}
        return dims, numerics

    def prefetch(self, refs: Sequence[AdapterRef]) -> None:
        self._all("prefetch", refs)

    def page_in(
        self, refs: Sequence[AdapterRef], with_moments: bool, keep: Sequence[AdapterKey] = ()
    ) -> Paging:
        """All shards find adapters in the same tiers; the store is asked by each."""
        pagings: list[Paging] = self._all("page_in", refs, with_moments, keep)
        return replace(
            pagings[0], store_calls=add_calls([paging.store_calls for paging in pagings])
        )

    def evict(self, keys: Sequence[AdapterKey]) -> None:
        self._all("evict", keys)

    def committed(self, pairs: Sequence[tuple[AdapterKey, AdapterKey]]) -> None:
        self._all("committed", pairs)

    def forget(self, pseudonyms: Sequence[str]) -> None:
        self._all("forget", pseudonyms)

    def roll_out(self, requests: Sequence[RolloutRequest]) -> list[RolloutGroup]:
        return join_shares(self._all("roll_out_share", requests))

    def score_base(self, groups: Sequence[RolloutGroup]) -> list[tuple[Floats, ...]]:
        return join_shares(self._all("score_base_share", groups))

    def train_wave(self, batch: WaveBatch) -> StepResult:
        result = join_steps(self._all("train_share", batch))
        self.num_restarts = 0
        return result

    def stop(self) -> None:
        """Remove the group, unless another owner has adopted it meanwhile."""
        with contextlib.suppress(NotTheOwner):
            self._discard()

    def _name(self, rank: int) -> str:
        return f"{self._prefix}{rank}"

    def _attach(self) -> bool:
        """Go on with the actors of a controller that died, if they are what this one would start;
        else remove them."""
        found = actors_of(self._prefix)
        wanted = [self._name(rank) for rank in range(self.group.count)]
        if found.keys() == set(wanted):
            shards = [found[name] for name in wanted]
            try:
                own = {**versions(), "gpus": str(self._gpus)}
                answers = [shard.adopt.remote(self.settings, own, self._token) for shard in shards]
                if all(ray.get(answers, timeout=_ATTACH_TIMEOUT_S)):
                    self._shards = shards
                    return True
            except RayError as error:
                logger.warning(
                    "the shards of an earlier run don't answer (%s); starting new ones", error
                )
        remove_group(self._prefix)
        return False

    def _place(self) -> None:
        """Ask for room: one bundle per shard, on as many nodes as there are."""
        bundle = {"CPU": self.group.cpus, "GPU": self._gpus}
        bundles = [{name: n for name, n in bundle.items() if n} for _ in range(self.group.count)]
        self._places = placement_group(
            bundles, strategy="SPREAD", lifetime="detached", name=self._prefix
        )

    def _wait_for_places(self, tick: Callable[[int, int], None] | None) -> None:
        if self._places is None or self._shards:
            return
        deadline, placed = time.monotonic() + self.group.place_timeout_s, self._places.ready()
        while not ray.wait([placed], timeout=0.5)[0]:
            if tick is not None:
                tick(0, self.group.count)
            if time.monotonic() > deadline:
                free = ray.available_resources()
                asked = f"shard.count is {self.group.count} and shard.cpus is {self.group.cpus}"
                has = f"{free.get('CPU', 0.0):g} CPUs"
                if self._gpus:
                    asked += f", with {self._gpus} GPU for each shard"
                    has += f" and {free.get('GPU', 0.0):g} GPUs"
                raise InvalidInput(
                    f"{asked}, but the cluster has {has} free; add nodes, ask for less "
                    "(shard.replicas is the number of groups, base.device=cpu needs no GPU), or "
                    "raise shard.place_timeout_s"
                )

    def _create(self) -> None:
        # Huge pages: a pass allocates and frees gigabytes, and faulting them in by 4 KiB costs a
        # quarter of it.
        environment = {"env_vars": {"THP_MEM_ALLOC_ENABLE": "1"}}
        for rank in range(self.group.count):
            place = PlacementGroupSchedulingStrategy(
                self._places, placement_group_bundle_index=rank
            )
            options = RemoteShard.options(
                name=self._name(rank), namespace=NAMESPACE, lifetime="detached",
                num_cpus=self.group.cpus, num_gpus=self._gpus,
                scheduling_strategy=place, runtime_env=environment,
            )  # fmt: skip
            self._shards.append(options.remote(self.settings, rank, self._token))
        rendezvous = None
        if self.group.count > 1:
            answer = self._shards[0].rendezvous.remote(self.group.timeout_s)
            if not ray.wait([answer], timeout=self.group.timeout_s)[0]:
                raise ShardGroupLost(f"a shard did not start in {self.group.timeout_s:g} s")
            (rendezvous,) = self._get([answer])
        self._loading = [shard.load.remote(rendezvous) for shard in self._shards]

    def _discard(self) -> None:
        """Kill the actors and give their places back; `NotTheOwner` if another owner has adopted
        them meanwhile."""
        for shard in self._shards:
            try:
                ray.get(shard.call.remote(self._token, "ping"), timeout=_ATTACH_TIMEOUT_S)
            except NotTheOwner:
                self._shards, self._places, self._loading = [], None, []
                raise
            except Exception as error:  # dead, hung, or not loaded: whatever it is, it goes
                logger.debug("%s before it was killed: %s", shard, error)
            ray.kill(shard)
        # An adopted group's places are known by their name only.
        remove_places(self._prefix)
        self._shards, self._places, self._loading = [], None, []

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """Every shard runs it; they need each other for most."""
        shared = [ray.put(argument) for argument in arguments]
        return self._get(
            [shard.call.remote(self._token, method, *shared) for shard in self._shards]
        )

    def _get(self, references: Sequence[Any]) -> list[Any]:
        """All answers, or the first error: at once, because after it the others may wait for
        ever."""
        waiting = list(references)
        try:
            while waiting:
                ready, waiting = ray.wait(waiting, num_returns=1)
                ray.get(ready)
            answers: list[Any] = ray.get(list(references))
            return answers
        except NotTheOwner as error:
            raise _without_traceback(error) from None
        except Exception as error:
            # What Ray raises by itself says that a process or its answer is gone; all else, that a
            # shard refused.
            if isinstance(error, ExchangeBroken) or (
                isinstance(error, RayError) and not isinstance(error, RayTaskError)
            ):
                raise ShardGroupLost(f"a shard died: {_last_line(error)}") from error
            _, late = (
                ray.wait(waiting, num_returns=len(waiting), timeout=_STRAGGLER_TIMEOUT_S)
                if waiting
                else ([], [])
            )
            if late:
                raise ShardGroupLost(
                    f"a shard refused what the others wait for: {_last_line(error)}"
                ) from error
            if len(references) > 1:
                self._reset()
            raise _without_traceback(error) from None

    def _reset(self) -> None:
        """Where one shard refused and others went on, slots no longer agree: nothing stays hot."""
        try:
            ray.get([shard.call.remote(self._token, "reset") for shard in self._shards])
        except NotTheOwner:
            raise
        except RayError as error:
            raise ShardGroupLost(f"a shard died: {_last_line(error)}") from error


def check_devices(devices: Sequence[str]) -> str:
    """What all shards compute on; `InvalidInput` unless it is one kind of device and one dtype."""
    if len(set(devices)) > 1:
        raise InvalidInput(
            f"the shards of one group compute on {', '.join(sorted(set(devices)))}; set "
            "base.device and base.dtype to what every node has"
        )
    return devices[0]


def _without_traceback(error: Exception) -> Exception:
    """A shard's own error: Ray's has the traceback of another process for its text."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, PopulaceError) else error


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
