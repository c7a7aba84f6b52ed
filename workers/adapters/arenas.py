"""Slots on a CPU, at the exact ranks of their adapters: four fp32 tensors, one adapter per row in
`AdapterLayout` order.

Ranks that products pad to the same share memory (a bucket), whose rows have room for the padded
layout. All slots of a bucket are mapped at once, and memory that is never written costs nothing.
An arena is how adapters of one pair of ranks are seen in their bucket.

Suffixes: S slots of a bucket, P elements of an adapter.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection

import torch
from torch import Tensor

from populace.kernels.grouped import padded_rank
from populace.kernels.lora import LoraWeights
from populace.workers.layout import AdapterLayout, layout_of
from populace.workers.shapes import EXPERT_MODULES, AdapterSpec, BaseDims
from populace.workers.shards.placement import Shard, SlotAddress


class Bucket:
    """The slots of all ranks that are padded alike."""

    def __init__(self, padded: AdapterLayout, slots: int) -> None:
        # The last row is nobody's: what pads is read from there, and behind nobody ends the memory.
        self.weights, self.grads, self.m, self.v = (
            _untouched_zeros(slots + 1, padded.size) for _ in range(4)
        )
        self.scales_2S = torch.zeros(2, slots)
        """Of attention and of experts."""
        self.free = set(range(slots))
        self.used: set[int] = set()
        """Rows that ever held an adapter; the others are zeros that cost no memory yet."""


class Arena:
    """Adapters of one pair of ranks."""

    def __init__(self, dims: BaseDims, ranks: tuple[int, int], bucket: Bucket) -> None:
        self.layout, self.bucket = layout_of(dims, *ranks), bucket
        self._views: dict[tuple[str, int], LoraWeights] = {}

    def lora(self, module: str, layer: int) -> LoraWeights | None:
        """Views of a module's tensors; None where these adapters leave it alone."""
        kind = int(module in EXPERT_MODULES)
        if (module, layer, "a") not in (self.layout.dense, self.layout.expert)[kind]:
            return None
        if (module, layer) not in self._views:
            views = {
                name + which: self.layout.view(flat, module, layer, which)
                for name, flat in (("", self.bucket.weights), ("grad_", self.bucket.grads))
                for which in "ab"
            }
            self._views[module, layer] = LoraWeights(**views, scale_S=self.bucket.scales_2S[kind])
        return self._views[module, layer]


class Arenas:
    """The slots of one shard: arenas, in the order in which their ranks were first asked for."""

    def __init__(self, dims: BaseDims, slots: int, dtype: torch.dtype, shard: Shard) -> None:
        """`dtype`: of the base, which products pad for."""
        self._dims, self._slots, self._dtype, self._shard = dims, slots, dtype, shard
        self._arenas: list[Arena] = []
        self._arena_of: dict[tuple[int, int], int] = {}
        self._buckets: dict[tuple[int, ...], Bucket] = {}
        self.buckets: tuple[int, ...] = ()
        """By arena: the number of its bucket."""

    def take(self, spec: AdapterSpec, home: int | None = None) -> SlotAddress | None:
        """A free slot of the spec's ranks, with zero moments; its weights and gradient are
        undefined. `home`: the shard that its dense part must be on; None if no such slot is free.
        """
        if spec.ranks not in self._arena_of:
            self._add_arena(spec.ranks)
        number = self._arena_of[spec.ranks]
        arena = self._arenas[number]
        bucket = arena.bucket
        # The lowest, so that it follows from which slots are taken, on every shard alike.
        row = lowest_at_home(bucket.free, number, home, self._shard)
        if row is None:
            return None
        bucket.free.remove(row)
        for kind, rank in enumerate(spec.ranks):
            bucket.scales_2S[kind, row] = spec.alpha / rank if rank else 0.0
        address = SlotAddress(number, row)
        if row in bucket.used:
            # The dense part is written at the adapter's home alone.
            start = 0 if self._shard.is_home(address) else arena.layout.dense_size
            for name in ("m", "v"):
                self.part(address, name)[start:].zero_()
        bucket.used.add(row)
        return address

    def _add_arena(self, ranks: tuple[int, int]) -> None:
        padded = tuple(padded_rank(rank, self._dtype) for rank in ranks)
        if padded not in self._buckets:
            self._buckets[padded] = Bucket(layout_of(self._dims, *padded), self._slots)
        self._arena_of[ranks] = len(self._arenas)
        self._arenas.append(Arena(self._dims, ranks, self._buckets[padded]))
        self.buckets += (list(self._buckets).index(padded),)

    def free(self, address: SlotAddress) -> None:
        self._arenas[address.arena].bucket.free.add(address.row)

    def layout(self, address: SlotAddress) -> AdapterLayout:
        return self._arenas[address.arena].layout

    def part(self, address: SlotAddress, name: str) -> Tensor:
        """One of a slot's tensors, [P]."""
        arena = self._arenas[address.arena]
        flat_SP: Tensor = getattr(arena.bucket, name)
        return flat_SP[address.row, : arena.layout.size]

    def hold(self, address: SlotAddress, names: Collection[str]) -> None:
        """Nothing to do: every part has its place, and costs nothing before it is written."""

    def let_go(self, address: SlotAddress, names: Collection[str]) -> None:
        """Nothing to do either: memory that was touched stays."""

    def lora(self, module: str, layer: int) -> list[LoraWeights | None]:
        """By arena."""
        return [arena.lora(module, layer) for arena in self._arenas]

    def covers(self, kind: int) -> list[bool]:
        """By arena: whether its adapters have anything on attention (0) or on experts (1)."""
        return [bool(ranks[kind]) for ranks in self._arena_of]


def lowest_at_home(free: Collection[int], arena: int, home: int | None, shard: Shard) -> int | None:
    """The lowest free row of an arena whose adapter is at home on this shard (None: on any)."""
    rows = (row for row in free if home in (None, shard.home_of(SlotAddress(arena, row))))
    return min(rows, default=None)


def _untouched_zeros(slots: int, size: int) -> Tensor:
    """[slots, size] fp32 zeros, mapped and never touched: a row costs memory from its first write
    on."""
    return torch.frombuffer(mmap.mmap(-1, slots * size * 4), dtype=torch.float32).view(slots, size)
