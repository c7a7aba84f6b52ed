"""Slots on a CPU: one arena per pair of ranks, four fp32 tensors [S, P] with one adapter per row in
`AdapterLayout` order, at its exact ranks.

All slots of an arena are mapped at once, and memory that is never written costs nothing.

Suffixes: S slots, P elements of an adapter.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection

import torch
from torch import Tensor

from populace.kernels.lora import LoraWeights
from populace.workers.layout import AdapterLayout, layout_of
from populace.workers.shapes import EXPERT_MODULES, AdapterSpec, BaseDims
from populace.workers.shards.placement import Shard, SlotAddress


class Arena:
    """All slots of one pair of ranks."""

    def __init__(self, dims: BaseDims, ranks: tuple[int, int], slots: int) -> None:
        self.layout = layout_of(dims, *ranks)
        self.weights, self.grads, self.m, self.v = (
            _untouched_zeros(slots, self.layout.size) for _ in range(4)
        )
        self.scales_2S = torch.zeros(2, slots)
        """Of attention and of experts."""
        self.free = set(range(slots))
        self.used: set[int] = set()
        """Rows that ever held an adapter; the others are zeros that cost no memory yet."""
        self._views: dict[tuple[str, int], LoraWeights] = {}

    def lora(self, module: str, layer: int) -> LoraWeights | None:
        """Views of a module's tensors; None where these adapters leave it alone."""
        kind = int(module in EXPERT_MODULES)
        if (module, layer, "a") not in (self.layout.dense, self.layout.expert)[kind]:
            return None
        if (module, layer) not in self._views:
            views = {
                name + which: self.layout.view(flat, module, layer, which)
                for name, flat in (("", self.weights), ("grad_", self.grads))
                for which in "ab"
            }
            self._views[module, layer] = LoraWeights(**views, scale_S=self.scales_2S[kind])
        return self._views[module, layer]


class Arenas:
    """The slots of one shard: arenas, in the order in which their ranks were first asked for."""

    def __init__(self, dims: BaseDims, slots: int, shard: Shard) -> None:
        self._dims, self._slots, self._shard = dims, slots, shard
        self._arenas: list[Arena] = []
        self._arena_of: dict[tuple[int, int], int] = {}

    def take(self, spec: AdapterSpec, home: int | None = None) -> SlotAddress | None:
        """A free slot of the spec's ranks, with zero moments; its weights and gradient are
        undefined. `home`: the shard that its dense part must be on; None if no such slot is free.
        """
        if spec.ranks not in self._arena_of:
            self._arena_of[spec.ranks] = len(self._arenas)
            self._arenas.append(Arena(self._dims, spec.ranks, self._slots))
        number = self._arena_of[spec.ranks]
        arena = self._arenas[number]
        # The lowest, so that it follows from which slots are taken, on every shard alike.
        row = lowest_at_home(arena.free, number, home, self._shard)
        if row is None:
            return None
        arena.free.remove(row)
        for kind, rank in enumerate(spec.ranks):
            arena.scales_2S[kind, row] = spec.alpha / rank if rank else 0.0
        address = SlotAddress(number, row)
        if row in arena.used:
            # The dense part is written at the adapter's home alone.
            start = 0 if self._shard.is_home(address) else arena.layout.dense_size
            arena.m[row, start:].zero_()
            arena.v[row, start:].zero_()
        arena.used.add(row)
        return address

    def free(self, address: SlotAddress) -> None:
        self._arenas[address.arena].free.add(address.row)

    def layout(self, address: SlotAddress) -> AdapterLayout:
        return self._arenas[address.arena].layout

    def part(self, address: SlotAddress, name: str) -> Tensor:
        """One of a slot's tensors, [P]."""
        flat_SP: Tensor = getattr(self._arenas[address.arena], name)
        return flat_SP[address.row]

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
