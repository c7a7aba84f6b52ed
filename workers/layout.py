"""`AdapterLayout`: which modules carry LoRA, their shapes, and each tensor's place in an adapter's
flat buffer.

The order is fixed for ever: the dense part (layer by layer, module by module, A then B), then
expert 0 … E-1, each layer by layer. So a blob is independent of the number of shards, and an
expert's tensors lie together.

Suffixes: L layers, E experts, D in, F out, R rank.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from populace.workers.shapes import EXPERT_MODULES, BaseDims


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor inside the flat buffer; an expert's place is relative to the start of that
    expert's part."""

    module: str
    layer: int
    which: str
    offset: int
    shape: tuple[int, int]


class AdapterLayout:
    """Places of all tensors for ranks `rank` and `expert_rank`; a rank of 0 has none of its
    kind."""

    def __init__(self, dims: BaseDims, rank: int, expert_rank: int) -> None:
        self.dims, self.rank, self.expert_rank = dims, rank, expert_rank
        self.dense, self.dense_size = self._places(dims.dense_modules, rank, 0)
        self.expert, self.expert_size = self._places(
            EXPERT_MODULES, expert_rank, dims.num_dense_layers
        )
        self.size = self.dense_size + dims.num_experts * self.expert_size

    def _places(
        self, modules: tuple[str, ...], rank: int, first_layer: int
    ) -> tuple[dict[tuple[str, int, str], TensorPlace], int]:
        shapes = {module: (out, inp) for module, out, inp in self.dims.shapes}
        places: dict[tuple[str, int, str], TensorPlace] = {}
        offset = 0
        for layer in range(first_layer, self.dims.num_layers):
            for module in modules if rank else ():
                out, inp = shapes[module]
                for which, shape in (("a", (rank, inp)), ("b", (out, rank))):
                    places[module, layer, which] = TensorPlace(module, layer, which, offset, shape)
                    offset += shape[0] * shape[1]
        return places, offset

    def view(self, flat: Tensor, module: str, layer: int, which: str) -> Tensor:
        """The tensor inside `flat` [..., P]: [..., rows, cols], or [..., E, rows, cols] for expert
        modules. Shares memory."""
        lead, strides = flat.shape[:-1], flat.stride()[:-1]
        if module in EXPERT_MODULES:
            place = self.expert[module, layer, which]
            shape = (*lead, self.dims.num_experts, *place.shape)
            stride = (*strides, self.expert_size, place.shape[1], 1)
            return flat.as_strided(
                shape, stride, flat.storage_offset() + self.dense_size + place.offset
            )
        place = self.dense[module, layer, which]
        return flat.as_strided(
            (*lead, *place.shape),
            (*strides, place.shape[1], 1),
            flat.storage_offset() + place.offset,
        )

    def expert_range(self, expert: int) -> tuple[int, int]:
        start = self.dense_size + expert * self.expert_size
        return start, start + self.expert_size


def pad_ranks(flat_P: Tensor, exact: AdapterLayout, padded: AdapterLayout) -> Tensor:
    """An adapter of one layout in another whose ranks are no smaller, zeros between; itself where
    the two are one."""
    if exact is padded:
        return flat_P
    wide_P = flat_P.new_zeros(padded.size)
    for place in (*exact.dense.values(), *exact.expert.values()):
        target = padded.view(wide_P, place.module, place.layer, place.which)
        target[..., : place.shape[0], : place.shape[1]] = exact.view(
            flat_P, place.module, place.layer, place.which
        )
    return wide_P


@functools.lru_cache(maxsize=64)
def layout_of(dims: BaseDims, rank: int, expert_rank: int) -> AdapterLayout:
    return AdapterLayout(dims, rank, expert_rank)


def initial_weights(layout: AdapterLayout, seed: int) -> Tensor:
    """Revision 0 as a flat fp32 buffer [P]: A uniform in ±1/sqrt(D) as PEFT and nn.Linear draw it
    (Kaiming with a = sqrt 5), B zero. NumPy's Philox, so that the same seed gives the same bits in
    every torch version."""
    flat = torch.zeros(layout.size)
    generator = np.random.Generator(np.random.Philox(key=seed))
    draws = torch.from_numpy(generator.random(layout.size, dtype=np.float32) * 2 - 1)
    for (module, layer, which), place in {**layout.dense, **layout.expert}.items():
        if which == "a":
            bound = 1 / math.sqrt(place.shape[1])
            layout.view(flat, module, layer, which).copy_(
                layout.view(draws, module, layer, which) * bound
            )
    return flat
