"""Which shard holds what: pure arithmetic over a base's shapes.

Experts are split in contiguous ranges; everything else is needed by every row and so lies on every
shard, whole or (with ZeRO-3) in parts that DeepSpeed cuts. A user's rows, with its adapter's dense
tensors, live on one shard.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from populace.storage.errors import InvalidInput

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def is_expert(tensor: str) -> bool:
    """Whether this is an expert's, by its name in a checkpoint."""
    return _EXPERT.search(tensor) is not None


class SlotAddress(NamedTuple):
    """Where a hot adapter lies: the arena of its ranks, and its row in it. The same on every shard.

    Example: `SlotAddress(arena=0, row=5)`; rows of the base alone have `NO_SLOT`."""

    arena: int
    row: int


NO_SLOT = SlotAddress(-1, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One member of a shard group."""

    rank: int
    num_shards: int
    experts: range
    """Those it owns, by their numbers in the base."""

    def is_home(self, address: SlotAddress) -> bool:
        """Whether the adapter at this address has its rows and its dense tensors here."""
        return self.home_of(address) == self.rank

    def home_of(self, address: SlotAddress) -> int:
        """The rank of the shard that has the adapter's rows."""
        return (address.arena + address.row) % self.num_shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where every parameter of a base is."""

    shards: tuple[Shard, ...]

    @property
    def owners(self) -> tuple[int, ...]:
        """The shard of each expert."""
        return tuple(shard.rank for shard in self.shards for _ in shard.experts)

    def shards_of(self, tensor: str) -> tuple[int, ...]:
        """Shards that read this tensor of the checkpoint: an expert's has one, all others are
        replicated."""
        if (found := _EXPERT.search(tensor)) is not None:
            return (self.owners[int(found[1])],)
        return tuple(range(len(self.shards)))

    def tensors_of(self, rank: int, tensors: Iterable[str]) -> list[str]:
        """Those of `tensors` that shard `rank` reads."""
        return [tensor for tensor in tensors if rank in self.shards_of(tensor)]


def place_shards(num_experts: int, num_shards: int) -> Placement:
    """Contiguous ranges of experts, as even as whole experts allow; `InvalidInput` where a shard
    would have none."""
    if not 0 < num_shards <= num_experts:
        raise InvalidInput(
            f"shard.count is {num_shards}; this base has {num_experts} experts, use 1 to "
            f"{num_experts}"
        )
    bounds = [rank * num_experts // num_shards for rank in range(num_shards + 1)]
    return Placement(
        shards=tuple(
            Shard(rank=rank, num_shards=num_shards, experts=range(bounds[rank], bounds[rank + 1]))
            for rank in range(num_shards)
        )
    )
