"""Slots on a CUDA device: every tensor of a slot is an allocation of its own, at the exact ranks of
its adapter, and kernels find it through tables of addresses.

Weights are there while the slot is taken; gradient and moments only while somebody holds them. A
table is rewritten in place, on the stream that computes: passes that were started before read the
old addresses, and the allocator gives freed memory to that stream alone.

Suffixes: S slots, P elements of an adapter as this shard has it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from populace.kernels.pointers import LoraPointers
from populace.workers.adapters.arenas import lowest_at_home
from populace.workers.device import Device, Download
from populace.workers.layout import AdapterLayout, layout_of
from populace.workers.shapes import EXPERT_MODULES, AdapterSpec, BaseDims
from populace.workers.shards.placement import Shard, SlotAddress

_ADDRESSES = ("weights", "grads")


@dataclass(slots=True, kw_only=True)
class _Buffer:
    """One taken slot."""

    layout: AdapterLayout
    spec: AdapterSpec
    parts: dict[str, Tensor] = field(default_factory=dict)
    paged_out: dict[str, Download] = field(default_factory=dict)


class SlotBuffers:
    """The slots of one shard. Addresses have arena 0: there are none."""

    def __init__(self, dims: BaseDims, slots: int, device: Device, shard: Shard) -> None:
        self._dims, self._device, self._shard = dims, device, shard
        self._buffers: dict[int, _Buffer] = {}
        self._free = set(range(slots))
        # Every row begins at a multiple of 16 bytes: Triton would compile its kernels anew for one
        # that doesn't.
        width = -(-slots // 4) * 4
        # Rows of addresses: weights then gradients, of attention then of experts; and the ranks.
        self._host = torch.zeros(6, width, dtype=torch.int64)
        self._host_scales_2S = torch.zeros(2, width)
        self._table = device.zeros(6, width, dtype=torch.int64)
        self._scales_2S = device.zeros(2, width, dtype=torch.float32)
        self._is_stale = False
        self._pointers: dict[tuple[str, int], LoraPointers] = {}

    def take(self, spec: AdapterSpec, home: int | None = None) -> SlotAddress | None:
        """A free slot with room for weights, and no moments. `home`: the shard that its dense part
        must be on; None if no such slot is free."""
        row = lowest_at_home(self._free, 0, home, self._shard)
        if row is None:
            return None
        address = SlotAddress(0, row)
        rank, expert_rank = spec.ranks
        # The dense part is at the adapter's home alone.
        own = (rank if self._shard.is_home(address) else 0, expert_rank)
        self._buffers[row] = _Buffer(layout=layout_of(self._dims, *own), spec=spec)
        self._free.remove(row)
        self.hold(address, ("weights",))
        return address

    def free(self, address: SlotAddress) -> None:
        del self._buffers[address.row]
        self._free.add(address.row)
        self._write_row(address.row)

    def layout(self, address: SlotAddress) -> AdapterLayout:
        return self._buffers[address.row].layout

    def part(self, address: SlotAddress, name: str) -> Tensor:
        """One of a slot's tensors, [P], which somebody holds."""
        return self._buffers[address.row].parts[name]

    def hold(self, address: SlotAddress, names: Collection[str]) -> None:
        """See that these tensors have memory; what was paged out comes back, what is new is
        zero."""
        buffer = self._buffers[address.row]
        for name in names:
            if name in buffer.parts:
                continue
            own_P = self._device.zeros(buffer.layout.size, dtype=torch.float32)
            if name in buffer.paged_out:
                (host_P,) = buffer.paged_out.pop(name).arrays()
                self._device.fill(own_P, torch.from_numpy(host_P))
            buffer.parts[name] = own_P
        self._write_row(address.row)

    def let_go(self, address: SlotAddress, names: Collection[str]) -> None:
        """Give the memory of these tensors back, with what is in it."""
        buffer = self._buffers[address.row]
        for name in names:
            buffer.parts.pop(name, None)
            buffer.paged_out.pop(name, None)
        self._write_row(address.row)

    def page_out(self, address: SlotAddress, name: str) -> None:
        """Give the memory of a tensor back and keep what is in it on the host, until it is held
        again."""
        buffer = self._buffers[address.row]
        if name in buffer.parts:
            buffer.paged_out[name] = self._device.download(buffer.parts.pop(name))
            self._write_row(address.row)

    @property
    def held_bytes(self) -> int:
        """Of all tensors of all slots."""
        return sum(
            tensor.nbytes for buffer in self._buffers.values() for tensor in buffer.parts.values()
        )

    def lora(self, module: str, layer: int) -> LoraPointers:
        """Where the slots have a module's tensors, as of now."""
        if self._is_stale:
            host, scales = self._device.upload(self._host, self._host_scales_2S)
            self._table.copy_(host)
            self._scales_2S.copy_(scales)
            self._pointers.clear()
            self._is_stale = False
        if (module, layer) not in self._pointers:
            self._pointers[module, layer] = self._pointers_of(module, layer)
        return self._pointers[module, layer]

    def _pointers_of(self, module: str, layer: int) -> LoraPointers:
        kind = int(module in EXPERT_MODULES)
        unit = layout_of(self._dims, 1, 1)
        place = (unit.expert if kind else unit.dense)[module, layer, "a"]
        # As the host's copy has them: to ask the table would be to wait for it.
        ranks = set(self._host[4 + kind].tolist())
        return LoraPointers(
            weights_S=self._table[kind],
            grads_S=self._table[2 + kind],
            rank_S=self._table[4 + kind],
            scale_S=self._scales_2S[kind],
            ranks=tuple(sorted(ranks - {0})),
            inner=place.shape[1],
            offset=place.offset,
            expert_step=unit.expert_size if kind else 0,
        )

    def _write_row(self, row: int) -> None:
        """What the tables say of a slot from the next pass on."""
        buffer = self._buffers.get(row)
        self._host[:, row] = 0
        self._host_scales_2S[:, row] = 0
        self._is_stale = True
        if buffer is None:
            return
        layout = buffer.layout
        for kind, rank in enumerate((layout.rank, layout.expert_rank)):
            self._host[4 + kind, row] = rank
            self._host_scales_2S[kind, row] = buffer.spec.alpha / rank if rank else 0.0
            for number, name in enumerate(_ADDRESSES):
                if name in buffer.parts:
                    start = layout.dense_size * 4 * kind
                    self._host[2 * number + kind, row] = buffer.parts[name].data_ptr() + start
