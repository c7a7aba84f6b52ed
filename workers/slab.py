"""Slots: weights, gradients and optimizer moments of the adapters that are hot.

One arena per pair of stored ranks; an arena is four fp32 tensors [S, N] with one adapter per row in
`AdapterLayout` order. A wave of mixed ranks touches several arenas and pads nothing to the largest.

Suffixes: S slots, N elements of a stored adapter, E experts.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from populace.kernels.lora import LoraWeights
from populace.workers.batch import AdapterKey
from populace.workers.layout import (
    EXPERT_MODULES,
    AdapterLayout,
    AdapterSpec,
    BaseDims,
    initial_weights,
    layout_of,
    pad_into,
    stored_rank,
    unpad,
)

Blob = bytes | memoryview


@dataclass(slots=True, kw_only=True)
class SlotState:
    """What an adapter carries besides tensors. All but `experts` travels in the moments blob."""

    experts: frozenset[int] = frozenset()
    """Experts that ever got a gradient: their tensors are no longer as initialised; they stand in the manifest."""
    step: int = 0
    baseline: float = 0.0
    num_rewards: int = 0


class Arena:
    """All slots of one pair of stored ranks."""

    def __init__(self, dims: BaseDims, rank: int, expert_rank: int, slots: int) -> None:
        self.layout = layout_of(dims, rank, expert_rank)
        self.weights, self.grads, self.m, self.v = (_untouched_zeros(slots, self.layout.size) for _ in range(4))
        self.dense_scale_S = torch.zeros(slots)
        self.expert_scale_S = torch.zeros(slots)
        self.free = list(range(slots))[::-1]
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
    """[slots, size] fp32 zeros, mapped and never touched: a row costs memory from its first write on."""
    return torch.frombuffer(mmap.mmap(-1, slots * size * 4), dtype=torch.float32).view(slots, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    arena: int
    row: int
    spec: AdapterSpec
    seed: int
    state: SlotState


class Slab:
    """Slots of one shard, addressed by adapter revision. At most `slots` are taken at a time."""

    def __init__(self, dims: BaseDims, slots: int, dtype: torch.dtype) -> None:
        self.dims, self.capacity, self.dtype = dims, slots, dtype
        self.arenas: list[Arena] = []
        self._arena_of: dict[tuple[int, int], int] = {}
        self.slots: dict[AdapterKey, Slot] = {}

    def lora(self, module: str, layer: int) -> list[LoraWeights]:
        return [arena.lora(module, layer) for arena in self.arenas]

    def exact_layout(self, spec: AdapterSpec) -> AdapterLayout:
        return layout_of(self.dims, spec.rank, spec.expert_rank)

    def take(self, key: AdapterKey, spec: AdapterSpec, seed: int) -> Slot:
        """A slot for `key`, with zero moments. Its weights are to be filled by `initialise` or `load`."""
        assert key not in self.slots and len(self.slots) < self.capacity
        ranks = (stored_rank(spec.rank, self.dtype), stored_rank(spec.expert_rank, self.dtype))
        if ranks not in self._arena_of:
            self._arena_of[ranks] = len(self.arenas)
            self.arenas.append(Arena(self.dims, *ranks, self.capacity))
        index = self._arena_of[ranks]
        arena = self.arenas[index]
        row = arena.free.pop()
        slot = self.slots[key] = Slot(arena=index, row=row, spec=spec, seed=seed, state=SlotState())
        if row in arena.used:
            for flat in (arena.weights, arena.m, arena.v):
                flat[row].zero_()
        arena.used.add(row)
        arena.dense_scale_S[row] = spec.scale_of("q_proj")
        arena.expert_scale_S[row] = spec.scale_of("gate_proj")
        return slot

    def initialise(self, key: AdapterKey) -> None:
        """Fill the slot of `key` with revision 0."""
        slot = self.slots[key]
        self._fill(slot, self.arenas[slot.arena].weights, initial_weights(self.exact_layout(slot.spec), slot.seed))

    def drop(self, key: AdapterKey) -> None:
        slot = self.slots.pop(key)
        self.arenas[slot.arena].free.append(slot.row)

    def rename(self, old: AdapterKey, new: AdapterKey) -> None:
        """The slot's content became another revision."""
        self.slots[new] = self.slots.pop(old)

    def load(self, key: AdapterKey, weights: Blob, moments: Blob | None, experts: tuple[int, ...]) -> None:
        """Fill the slot of `key` from blobs; experts that they leave out stay as initialised."""
        slot = self.slots[key]
        arena, exact = self.arenas[slot.arena], self.exact_layout(slot.spec)
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
        """Start the optimizer of `key` anew: what a revision that stopped being the tip continues with."""
        slot = self.slots[key]
        for flat in (self.arenas[slot.arena].m, self.arenas[slot.arena].v):
            flat[slot.row].zero_()
        slot.state.step, slot.state.baseline, slot.state.num_rewards = 0, 0.0, 0

    def dump(self, key: AdapterKey, experts: tuple[int, ...]) -> tuple[bytes, bytes]:
        """(weights, moments) blobs: fp32 little-endian in exact layout, dense part then the given experts; the
        moments start with step, baseline and reward count as three fp64, then m, then v."""
        slot = self.slots[key]
        arena, exact = self.arenas[slot.arena], self.exact_layout(slot.spec)
        parts = [
            part
            for flat in (arena.weights, arena.m, arena.v)
            for part in _parts(self.exact(slot, flat[slot.row]), exact, experts)
        ]
        num_parts = len(parts) // 3
        state = np.array([slot.state.step, slot.state.baseline, slot.state.num_rewards], np.float64)
        return b"".join(parts[:num_parts]), b"".join([state.tobytes(), *parts[num_parts:]])

    def exact(self, slot: Slot, row_N: Tensor) -> Tensor:
        """A row of the slot's arena without what pads its ranks."""
        return unpad(row_N, self.arenas[slot.arena].layout, self.exact_layout(slot.spec))

    def _fill(self, slot: Slot, flat: Tensor, exact_N: Tensor) -> None:
        pad_into(flat[slot.row], self.arenas[slot.arena].layout, exact_N, self.exact_layout(slot.spec))


def _parts(flat: Tensor, layout: AdapterLayout, experts: tuple[int, ...]) -> list[memoryview]:
    """The dense part and the given experts, as they lie in memory."""
    if len(experts) == layout.dims.num_experts:
        return [flat.numpy().data]
    ranges = [(0, layout.dense_size), *(layout.expert_range(expert) for expert in experts)]
    return [flat[start:end].numpy().data for start, end in ranges]


def _scatter_parts(flat: Tensor, layout: AdapterLayout, experts: tuple[int, ...], parts: Tensor) -> None:
    flat[: layout.dense_size] = parts[: layout.dense_size]
    for place, expert in enumerate(experts):
        start, end = layout.expert_range(expert)
        source = layout.dense_size + place * layout.expert_size
        flat[start:end] = parts[source : source + layout.expert_size]


def unpack_weights(layout: AdapterLayout, seed: int, weights: Blob | None, experts: tuple[int, ...]) -> Tensor:
    """A revision's weights in exact layout [N] from its blob; without one, the initialisation."""
    if weights is None:
        return initial_weights(layout, seed)
    given = torch.from_numpy(np.frombuffer(weights, np.float32).copy())
    if len(given) == layout.size:
        return given
    flat = initial_weights(layout, seed)
    _scatter_parts(flat, layout, experts, given)
    return flat
