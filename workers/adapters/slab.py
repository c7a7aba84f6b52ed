"""Slots: weights, gradients and optimizer moments of the adapters that are hot.

A shard's slab has room for the dense part and for its own experts. All shards of a group take the
same slots for the same adapters; the dense part is only filled at the adapter's home. Where the
memory is, `arenas.py` says for CPUs and `buffers.py` for CUDA devices; both have the same methods.

A slot's tensors are leased: a wave holds gradients and moments of what it trains, a reader holds
weights. Training a revision that somebody reads copies it first.

Suffixes: P elements of an adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from populace.kernels.lora import LoraWeights
from populace.kernels.pointers import LoraPointers
from populace.storage.errors import InvalidInput
from populace.workers.adapters.arenas import Arenas
from populace.workers.adapters.buffers import SlotBuffers
from populace.workers.batch import AdapterKey, AdapterParts, Floats
from populace.workers.device import Device, Download
from populace.workers.joins import join_parts
from populace.workers.layout import AdapterLayout, initial_weights, layout_of
from populace.workers.shapes import AdapterSpec, BaseDims
from populace.workers.shards.placement import Shard, SlotAddress, place_shards

Blob = bytes | memoryview

WEIGHTS, GRADS, MOMENTS = "weights", "grads", ("m", "v")


@dataclass(slots=True, kw_only=True)
class SlotState:
    """What an adapter carries besides tensors. All but `experts` travels in the moments blob."""

    experts: frozenset[int] = frozenset()
    """Experts that ever got a gradient: their tensors are no longer as initialised; they stand in
    the manifest."""
    step: int = 0
    baseline: float = 0.0
    num_rewards: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one adapter is hot, and what it carries besides tensors."""

    address: SlotAddress
    spec: AdapterSpec
    seed: int
    state: SlotState


class Dump:
    """What a shard has of an adapter, on its way to the host."""

    def __init__(self, ranges: dict[int, tuple[int, int]], download: Download) -> None:
        self._ranges, self._download = ranges, download

    def parts(self) -> AdapterParts:
        """Waits until it is there. On a CPU it shares the slab's memory."""
        found: list[dict[int, Floats]] = [
            {part: array[start:end] for part, (start, end) in self._ranges.items()}
            for array in self._download.arrays()
        ]
        return AdapterParts(*found, *[{}] * (3 - len(found)))


class Slab:
    """Slots of one shard, addressed by adapter revision. At most `slots` are taken at a time."""

    def __init__(
        self, dims: BaseDims, slots: int, device: Device, shard: Shard | None = None
    ) -> None:
        self.dims, self.capacity, self.device = dims, slots, device
        self.shard = shard or place_shards(dims.num_experts, 1).shards[0]
        self.own_dims = replace(dims, num_experts=len(self.shard.experts))
        self.memory: Arenas | SlotBuffers = (
            SlotBuffers(self.own_dims, slots, device, self.shard)
            if device.is_cuda
            else Arenas(self.own_dims, slots, device.dtype, self.shard)
        )
        self.slots: dict[AdapterKey, Slot] = {}
        """Revisions that are hot."""
        self._copies: dict[AdapterKey, Slot] = {}
        """What is trained of a revision that somebody reads."""
        self._readers: dict[str, list[Slot]] = {}
        """By owner."""
        self._unlisted: list[Slot] = []
        """Slots whose revision left while somebody reads them."""

    def lora(self, module: str, layer: int) -> Sequence[LoraWeights | None] | LoraPointers:
        """A module's tensors: of each arena, or tables of where each slot has them."""
        return self.memory.lora(module, layer)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Of each arena; see `SegmentPlan`. On a CPU."""
        assert isinstance(self.memory, Arenas)
        return self.memory.buckets

    def covered(self, arena_T: Tensor, *, is_expert: bool) -> Tensor:
        """The rows' arenas, -1 for those whose adapters have nothing on attention (or on experts):
        for them it is as if they had no adapter. On a CPU."""
        assert isinstance(self.memory, Arenas)
        covers = self.memory.covers(is_expert)
        if all(covers):
            return arena_T
        # Rows without an adapter have arena -1: the last.
        return torch.where(torch.tensor([*covers, False])[arena_T], arena_T, -1)

    def exact_layout(self, spec: AdapterSpec) -> AdapterLayout:
        """Layout of a whole adapter, as its blobs are."""
        return layout_of(self.dims, *spec.ranks)

    def is_home(self, key: AdapterKey) -> bool:
        """Whether the rows and the dense part of this adapter are here."""
        return self.shard.is_home(self.slots[key].address)

    @property
    def num_beside(self) -> int:
        """Slots that are taken beside those of hot revisions: copies that are trained, and what is
        still read of revisions that left."""
        return len(self._copies) + len(self._unlisted)

    def to_copy(self, keys: Collection[AdapterKey]) -> int:
        """Slots that training these revisions takes beside those that are taken: one for each that
        somebody reads, or it has its copy already."""
        return sum(key in keys and key not in self._copies for key in self.being_read)

    @property
    def being_read(self) -> list[AdapterKey]:
        """Hot revisions that somebody reads."""
        return [key for key, slot in self.slots.items() if self._is_read(slot)]

    def take(self, key: AdapterKey, spec: AdapterSpec, seed: int) -> Slot:
        """A slot for `key`, with zero moments. Its weights are to be filled by `initialise` or
        `load`."""
        assert key not in self.slots and len(self.slots) + self.num_beside < self.capacity
        address = self.memory.take(spec)
        assert address is not None
        slot = self.slots[key] = Slot(address=address, spec=spec, seed=seed, state=SlotState())
        return slot

    def initialise(self, key: AdapterKey) -> None:
        """Fill the slot of `key` with revision 0."""
        slot = self.slots[key]
        self._fill(slot, WEIGHTS, initial_weights(self.exact_layout(slot.spec), slot.seed))

    def drop(self, key: AdapterKey) -> None:
        """Forget a revision, and what was trained of it. Who reads it still can."""
        if key in self._copies:
            self._free(self._copies.pop(key))
        slot = self.slots.pop(key)
        if self._is_read(slot):
            self._unlisted.append(slot)
        else:
            self._free(slot)

    def drop_trained(self, key: AdapterKey) -> bool:
        """Forget what was trained of a revision that is read, and keep the revision; whether there
        was such a copy."""
        if key not in self._copies:
            return False
        self._free(self._copies.pop(key))
        return True

    def rename(self, old: AdapterKey, new: AdapterKey) -> bool:
        """What was trained of `old` became another revision; whether `old` stays hot beside it."""
        stays = old in self._copies
        self.slots[new] = self._copies.pop(old) if stays else self.slots.pop(old)
        return stays

    # Leases.

    def read(self, key: AdapterKey, owner: str) -> Slot:
        """The slot of a revision, whose weights stay as they are until `owner` is done. Not of one
        whose slot was trained in and isn't committed."""
        slot = self.slots[key]
        self._readers.setdefault(owner, []).append(slot)
        return slot

    def done_reading(self, owner: str) -> None:
        """End everything that `owner` reads."""
        for slot in self._readers.pop(owner, []):
            if slot in self._unlisted and not self._is_read(slot):
                self._unlisted.remove(slot)
                self._free(slot)

    def hold_for_training(self, key: AdapterKey) -> Slot:
        """The slot that `key` is trained in, with its gradient at zero: its own, or a copy where
        somebody reads that. `InvalidInput` where no slot is free for it."""
        slot = self.trained(key)
        if self._is_read(slot):
            slot = self._copies[key] = self._copy_of(slot)
        self.memory.hold(slot.address, (GRADS, *MOMENTS))
        self._own_range(slot, GRADS).zero_()
        return slot

    def end_training(self, key: AdapterKey, *, is_updated: bool) -> None:
        """A wave is done with the gradient, and with the copy if that stayed as it was."""
        self.memory.let_go(self.trained(key).address, (GRADS,))
        if not is_updated:
            self.drop_trained(key)

    def trained(self, key: AdapterKey) -> Slot:
        """The slot that `key` is trained in."""
        return self._copies.get(key, self.slots[key])

    def _copy_of(self, slot: Slot) -> Slot:
        address = None
        if len(self.slots) + self.num_beside < self.capacity:
            address = self.memory.take(slot.spec, self.shard.home_of(slot.address))
        if address is None:
            raise InvalidInput(
                f"scheduler.slots is {self.capacity} and none is free on the shard of a revision "
                "that is read, which is copied before it is trained: raise it"
            )
        copy = replace(slot, address=address, state=replace(slot.state))
        for held in (slot, copy):
            self.memory.hold(held.address, MOMENTS)
        for name in (WEIGHTS, *MOMENTS):
            self._own_range(copy, name).copy_(self._own_range(slot, name))
        return copy

    def _is_read(self, slot: Slot) -> bool:
        return any(slot in own for own in self._readers.values())

    def _free(self, slot: Slot) -> None:
        self.memory.free(slot.address)

    # What is in a slot.

    def load(
        self, key: AdapterKey, weights: Blob, moments: Blob | None, experts: tuple[int, ...]
    ) -> None:
        """Fill the slot of `key` from blobs; experts that they leave out stay as initialised."""
        slot = self.slots[key]
        exact = self.exact_layout(slot.spec)
        self._fill(slot, WEIGHTS, unpack_weights(exact, slot.seed, weights, experts))
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
        self.memory.hold(slot.address, MOMENTS)
        for name, part_P in zip(MOMENTS, both, strict=True):
            flat_P = torch.zeros(exact.size)
            _scatter_parts(flat_P, exact, experts, part_P)
            self._fill(slot, name, flat_P)

    def forget_moments(self, key: AdapterKey) -> None:
        """Start the optimizer of `key` anew: what a revision that stopped being the tip continues
        with."""
        slot = self.slots[key]
        self.memory.hold(slot.address, MOMENTS)
        for name in MOMENTS:
            self._own_range(slot, name).zero_()
        slot.state.step, slot.state.baseline, slot.state.num_rewards = 0, 0.0, 0

    def dump(self, slot: Slot, *, with_moments: bool = True) -> Dump:
        """Start to copy to the host what this shard has of an adapter."""
        layout = self.memory.layout(slot.address)
        ranges = {-1: (0, layout.dense_size)} if self.shard.is_home(slot.address) else {}
        ranges |= {
            expert: layout.expert_range(place)
            for place, expert in enumerate(self.shard.experts)
            if expert in slot.state.experts
        }
        names = (WEIGHTS, *MOMENTS) if with_moments else (WEIGHTS,)
        flats = (self.memory.part(slot.address, name) for name in names)
        return Dump(ranges, self.device.download(*flats))

    def blobs(self, key: AdapterKey, *, with_moments: bool) -> tuple[bytes, bytes | None]:
        """Weights and moments as they are committed; for a shard that has all of the adapter."""
        slot = self.slots[key]
        state = slot.state
        weights, moments = join_parts(
            (float(state.step), state.baseline, float(state.num_rewards)),
            [self.dump(slot, with_moments=with_moments).parts()],
        )
        return weights, moments if with_moments else None

    def _fill(self, slot: Slot, name: str, exact_P: Tensor) -> None:
        """Copy what this shard keeps of a whole adapter into its slot."""
        exact, own = self.exact_layout(slot.spec), self.memory.layout(slot.address)
        target_P, experts = self.memory.part(slot.address, name), self.shard.experts
        if self.shard.is_home(slot.address):
            self.device.fill(target_P[: own.dense_size], exact_P[: exact.dense_size])
        start, end = exact.expert_range(experts.start)[0], exact.expert_range(experts[-1])[1]
        self.device.fill(target_P[own.dense_size :], exact_P[start:end])

    def _own_range(self, slot: Slot, name: str) -> Tensor:
        """The part of a slot's tensor that this shard keeps: all of it, or all but the dense
        part."""
        dense_size = self.memory.layout(slot.address).dense_size
        start = 0 if self.shard.is_home(slot.address) else dense_size
        return self.memory.part(slot.address, name)[start:]


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
