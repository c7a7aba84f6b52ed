"""The Ray actor around one shard."""

from __future__ import annotations

import os

import ray

from populace.workers.engine import ShardEngine, ShardSettings, keep_freed_memory


class ShardActor(ShardEngine):
    """A `ShardEngine` in its own process. Methods run one at a time, in the order they are called."""

    def __init__(self, settings: ShardSettings) -> None:
        # Ray gives a worker OMP_NUM_THREADS=num_cpus; a shard uses what its settings say, or the machine.
        import torch

        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        keep_freed_memory()
        super().__init__(settings)

    def ping(self) -> int:
        """Process id; answers once the base is loaded."""
        return os.getpid()


RemoteShard = ray.remote(ShardActor)
