"""The Ray actor around one shard."""

from __future__ import annotations

import os

import ray

from populace.workers.engine import ShardEngine, ShardSettings, keep_freed_memory
from populace.workers.exchange import ALONE, DeepSpeedExchange, Rendezvous


class ShardActor(ShardEngine):
    """A `ShardEngine` in its own process. Methods run one at a time, in the order they are called."""

    def __init__(self, settings: ShardSettings, rank: int) -> None:
        # Ray gives a worker OMP_NUM_THREADS=num_cpus; a shard uses what its settings say, or the machine.
        import torch

        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        keep_freed_memory()
        self._start = settings, rank

    def rendezvous(self, timeout_s: float) -> Rendezvous:
        """Where the group can meet on this shard's node."""
        return Rendezvous.here(timeout_s)

    def load(self, rendezvous: Rendezvous | None) -> None:
        """Meet the others and load this shard's part of the base. Without a rendezvous it is the only shard."""
        settings, rank = self._start
        exchange = ALONE if rendezvous is None else DeepSpeedExchange(rank, settings.num_shards, rendezvous)
        super().__init__(settings, None, rank, exchange)

    def pid(self) -> int:
        return os.getpid()

    def is_loaded_with(self, settings: ShardSettings) -> bool:
        """Whether this shard can go on for a new controller that would start it with these settings."""
        return hasattr(self, "slab") and self.settings == settings


RemoteShard = ray.remote(ShardActor)
