"""Slots: weights, gradients and optimizer moments of the adapters that are hot.

One arena per pair of stored ranks; an arena is four fp32 tensors [S, P] with one adapter per row in
`AdapterLayout` order. A wave of mixed ranks touches several arenas and pads nothing to the largest.

A shard's slab has room for the dense part and for its own experts. All shards of a group take the
same slots for the same adapters; the dense part is only filled at the adapter's home, and memory
that is never written costs nothing.

Suffixes: S slots, P elements of a stored adapter, E experts.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from populace.kernels.lora import LoraWeights
from populace.workers.batch import AdapterKey, AdapterParts
from populace.workers.joins import join_parts
from populace.workers.layout import (
    AdapterLayout,
    initial_weights,
    layout_of,
    pad_into,
    stored_rank,
    unpad,
)
from populace.workers.shapes import EXPERT_MODULES, AdapterSpec, BaseDims
from populace.workers.shards.placement import Shard, SlotAddress, place_shards

Blob = bytes | memoryview


@dataclass(slots=True, kw_only=True)
class SlotState:
    """What an adapter carries besides tensors. All but `experts` travels in the moments blob."""

    experts: frozenset[int] = frozenset()
    """Experts that ever got a gradient: their tensors are no longer as initialised; they stand in
    the manifest."""
    step: int = 0
    baseline: float = 0.0
    num_rewards: int = 0


class Arena:
    """All slots of one pair of stored ranks."""

    def __init__(self, dims: BaseDims, rank: int, expert_rank: int, slots: int) -> None:
        self.layout = layout_of(dims, rank, expert_rank)
        self.weights, self.grads, self.m, self.v = (
            _untouched_zeros(slots, self.layout.size) for _ in range(4)
        )
        self.dense_scale_S = torch.zeros(slots)
        self.expert_scale_S = torch.zeros(slots)
        self.free = set(range(slots))
        self.used: set[int] = set()
        """Rows that ever held an adapter; the others are zeros that cost no memory yet."""
        self._views: dict[tuple[str, int], LoraWeights] = {}

    def lora(self, module: str, layer: int) -> LoraWeights:
        if (module, layer) not in self._views:
            views = {
                name + which: self.layout.view(flat, module, layer, which)
                for name, flat in (("", self.weights), ("grad_", self.grads))
                for which in "ab"
            }
            scale_S = self.expert_scale_S if module in EXPERT_MODULES else self.dense_scale_S
            self._views[module, layer] = LoraWeights(**views, scale_S=scale_S)
        return self._views[module, layer]


def _untouched_zeros(slots: int, size: int) -> Tensor:
    """[slots, size] fp32 zeros, mapped and never touched: a row costs memory from its first write
    on."""
    return torch.frombuffer(mmap.mmap(-1, slots * size * 4), dtype=torch.float32).view(slots, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one adapter is hot, and what it carries besides tensors."""

    address: SlotAddress
    spec: AdapterSpec
    seed: int
    state: SlotState


class Slab:
    """Slots of one shard, addressed by adapter revision. At most `slots` are taken at a time."""

    def __init__(
        self, dims: BaseDims, slots: int, dtype: torch.dtype, shard: Shard | None = None
    ) -> None:
        self.dims, self.capacity, self.dtype = dims, slots, dtype
        self.shard = shard or place_shards(dims.num_experts, 1).shards[0]
        self.own_dims = replace(dims, num_experts=len(self.shard.experts))
        self.arenas: list[Arena] = []
        self._arena_of: dict[tuple[int, int], int] = {}
        self.slots: dict[AdapterKey, Slot] = {}

    def lora(self, module: str, layer: int) -> list[LoraWeights]:
        return [arena.lora(module, layer) for arena in self.arenas]

    def exact_layout(self, spec: AdapterSpec) -> AdapterLayout:
        """Layout of a whole adapter, as its blobs are."""
        return layout_of(self.dims, spec.rank, spec.expert_rank)

    def is_home(self, key: AdapterKey) -> bool:
        """Whether the rows and the dense part of this adapter are here."""
        slot = self.slots[key]
        return self.shard.is_home(slot.address)

    def clear_gradient(self, key: AdapterKey) -> None:
        slot = self.slots[key]
        self._own_range(slot, self.arenas[slot.address.arena].grads).zero_()

    def take(self, key: AdapterKey, spec: AdapterSpec, seed: int) -> Slot:
        """A slot for `key`, with zero moments. Its weights are to be filled by `initialise` or
        `load`."""
        assert key not in self.slots and len(self.slots) < self.capacity
        ranks = (stored_rank(spec.rank, self.dtype), stored_rank(spec.expert_rank, self.dtype))
        if ranks not in self._arena_of:
            self._arena_of[ranks] = len(self.arenas)
            self.arenas.append(Arena(self.own_dims, *ranks, self.capacity))
        index = self._arena_of[ranks]
        arena = self.arenas[index]
        # The lowest, so that it follows from which slots are taken, on every shard alike.
        row = min(arena.free)
        arena.free.remove(row)
        slot = self.slots[key] = Slot(
            address=SlotAddress(index, row), spec=spec, seed=seed, state=SlotState()
        )
        if row in arena.used:
            for flat in (arena.weights, arena.m, arena.v):
                self._own_range(slot, flat).zero_()
        arena.used.add(row)
        arena.dense_scale_S[row] = spec.alpha / spec.rank
        arena.expert_scale_S[row] = spec.alpha / spec.expert_rank
        return slot

    def initialise(self, key: AdapterKey) -> None:
        """Fill the slot of `key` with revision 0."""
        slot = self.slots[key]
        self._fill(
            slot,
            self.arenas[slot.address.arena].weights,
            initial_weights(self.exact_layout(slot.spec), slot.seed),
        )

    def drop(self, key: AdapterKey) -> None:
        slot = self.slots.pop(key)
        self.arenas[slot.address.arena].free.add(slot.address.row)

    def rename(self, old: AdapterKey, new: AdapterKey) -> None:
        """The slot's content became another revision."""
        self.slots[new] = self.slots.pop(old)

    def load(
        self, key: AdapterKey, weights: Blob, moments: Blob | None, experts: tuple[int, ...]
    ) -> None:
        """Fill the slot of `key` from blobs; experts that they leave out stay as initialised."""
        slot = self.slots[key]
        arena, exact = self.arenas[slot.address.arena], self.exact_layout(slot.spec)
        self._fill(slot, arena.weights, unpack_weights(exact, slot.seed, weights, experts))
        slot.state.experts = frozenset(experts)
        if moments is None:
            return
        header = np.frombuffer(moments[:24], np.float64)
        slot.state.step, slot.state.baseline, slot.state.num_rewards = (
            int(header[0]),
            header[1],
            int(header[2]),
        )
        both = torch.from_numpy(np.frombuffer(moments[24:], np.float32).copy()).view(2, -1)
        for target, part in ((arena.m, both[0]), (arena.v, both[1])):
            flat = torch.zeros(exact.size)
            _scatter_parts(flat, exact, experts, part)
            self._fill(slot, target, flat)

    def forget_moments(self, key: AdapterKey) -> None:
        """Start the optimizer of `key` anew: what a revision that stopped being the tip continues
        with."""
        slot = self.slots[key]
        for flat in (self.arenas[slot.address.arena].m, self.arenas[slot.address.arena].v):
            self._own_range(slot, flat).zero_()
        slot.state.step, slot.state.baseline, slot.state.num_rewards = 0, 0.0, 0

    def dump(self, key: AdapterKey) -> AdapterParts:
        """What this shard has of an adapter, without what pads its ranks. Where nothing does, it
        shares the slab's memory."""
        slot = self.slots[key]
        arena, own = self.arenas[slot.address.arena], self._own_layout(slot.spec)
        parts = {-1: (0, own.dense_size)} if self.is_home(key) else {}
        parts |= {
            expert: own.expert_range(place)
            for place, expert in enumerate(self.shard.experts)
            if expert in slot.state.experts
        }
        flats = [
            self.exact(slot, flat[slot.address.row]) for flat in (arena.weights, arena.m, arena.v)
        ]
        return AdapterParts(
            *(
                {part: flat[start:end].numpy() for part, (start, end) in parts.items()}
                for flat in flats
            )
        )

    def blobs(self, key: AdapterKey) -> tuple[bytes, bytes]:
        """Weights and moments as they are committed; for a shard that has all of the adapter."""
        state = self.slots[key].state
        return join_parts(
            (float(state.step), state.baseline, float(state.num_rewards)), [self.dump(key)]
        )

    def exact(self, slot: Slot, row_P: Tensor) -> Tensor:
        """What this shard keeps of a row of the slot's arena, without what pads its ranks."""
        is_home = self.shard.is_home(slot.address)
        return unpad(
            row_P, self.arenas[slot.address.arena].layout, self._own_layout(slot.spec), is_home
        )

    def _own_layout(self, spec: AdapterSpec) -> AdapterLayout:
        return layout_of(self.own_dims, spec.rank, spec.expert_rank)

    def _fill(self, slot: Slot, flat: Tensor, exact_P: Tensor) -> None:
        """Copy what this shard keeps of a whole adapter into its slot."""
        exact, own = self.exact_layout(slot.spec), self._own_layout(slot.spec)
        if own is not exact:
            experts = self.shard.experts
            start, end = exact.expert_range(experts.start)[0], exact.expert_range(experts[-1])[1]
            exact_P = torch.cat([exact_P[: exact.dense_size], exact_P[start:end]])
        is_home = self.shard.is_home(slot.address)
        pad_into(
            flat[slot.address.row], self.arenas[slot.address.arena].layout, exact_P, own, is_home
        )

    def _own_range(self, slot: Slot, flat: Tensor) -> Tensor:
        """The part of a slot's row that this shard keeps: all of it, or all but the dense part."""
        is_home = self.shard.is_home(slot.address)
        return flat[
            slot.address.row, 0 if is_home else self.arenas[slot.address.arena].layout.dense_size :
        ]


def _scatter_parts(
    flat: Tensor, layout: AdapterLayout, experts: tuple[int, ...], parts: Tensor
) -> None:
    flat[: layout.dense_size] = parts[: layout.dense_size]
    for place, expert in enumerate(experts):
        start, end = layout.expert_range(expert)
        source = layout.dense_size + place * layout.expert_size
        flat[start:end] = parts[source : source + layout.expert_size]


def unpack_weights(
    layout: AdapterLayout, seed: int, weights: Blob | None, experts: tuple[int, ...]
) -> Tensor:
    """A revision's weights in exact layout [P] from its blob; without one, the initialisation."""
    if weights is None:
        return initial_weights(layout, seed)
    given = torch.from_numpy(np.frombuffer(weights, np.float32).copy())
    if len(given) == layout.size:
        return given
    flat = initial_weights(layout, seed)
    _scatter_parts(flat, layout, experts, given)
    return flat
