"""The Ray actor around one shard."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import ray
import torch

from populace.storage.errors import PopulaceError
from populace.workers.actors.engine import ShardEngine, ShardSettings, keep_freed_memory
from populace.workers.device import device_of
from populace.workers.shards.exchange import ALONE, DeepSpeedExchange, Rendezvous
from populace.workers.step.numerics import NUMERICS_REVISION


class NotTheOwner(PopulaceError):
    """These shards have another owner by now."""


def versions() -> dict[str, str]:
    """Versions of the code that runs in an actor."""
    return {
        "populace": version("populace"),
        "kernels": str(NUMERICS_REVISION),
        "torch": torch.__version__,
    }


class ShardActor(ShardEngine):
    """A `ShardEngine` in its own process. Methods run one at a time, in the order they are
    called."""

    def __init__(self, settings: ShardSettings, rank: int, token: str) -> None:
        """`token`: of the group that may give orders."""
        # Ray gives a worker OMP_NUM_THREADS=num_cpus; a shard uses what its settings say, or the
        # machine.
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        keep_freed_memory()
        self._start, self._token, self._is_loaded = (settings, rank), token, False

    def rendezvous(self, timeout_s: float) -> Rendezvous:
        """Where the group can meet on this shard's node."""
        return Rendezvous.at(str(ray.util.get_node_ip_address()), timeout_s)

    def load(self, rendezvous: Rendezvous | None) -> str:
        """Meet the others and load this shard's part of the base; says what it computes on and in
        which dtype. Without a rendezvous it is the only shard."""
        settings, rank = self._start
        # `auto` takes a GPU that Ray gave this actor, never one that is merely visible on the node.
        kind = settings.device if settings.device != "auto" or ray.get_gpu_ids() else "cpu"
        device = device_of(kind, settings.dtype)
        exchange = (
            ALONE
            if rendezvous is None
            else DeepSpeedExchange(rank, settings.num_shards, rendezvous, device)
        )
        super().__init__(settings, None, rank, exchange, device)
        self._is_loaded = True
        return f"{device.kind} in {str(device.dtype).removeprefix('torch.')}"

    def call(self, token: str, method: str, *arguments: Any) -> Any:
        """Run a method of `ShardEngine` for the group that owns this shard."""
        if token != self._token:
            raise NotTheOwner(
                "another controller has taken over this population's shards; this one must stop"
            )
        return getattr(self, method)(*arguments)

    def adopt(self, settings: ShardSettings, versions_wanted: dict[str, str], token: str) -> bool:
        """Go on for a new owner, with nothing hot, if this is what it would start; else False."""
        found = {**versions(), "gpus": str(len(ray.get_gpu_ids()))}
        if not self._is_loaded or self.settings != settings or found != versions_wanted:
            return False
        self._token = token
        self.reset()
        return True

    def ping(self) -> None:
        """Answer the owning group: this process lives and obeys it."""

    def pid(self) -> int:
        return os.getpid()


RemoteShard = ray.remote(ShardActor)
