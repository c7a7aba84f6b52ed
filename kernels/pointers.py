"""Where the adapters' tensors are on a device: every slot has memory of its own, at its exact rank,
and kernels find it through tables.

Suffixes: S slots, D in, F out, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPointers:
    """One module's A [R, D] and, right behind it, B [F, R] of every slot (of every expert), fp32.
    Slot s has the A of expert e at

        weights_S[s] + 4 · rank_S[s] · (offset + e · expert_step)    bytes,

    because the places of a layout are proportional to its rank."""

    weights_S: Tensor
    """int64 addresses of what the slots have of this kind of module; not of anybody's where
    `rank_S` is 0."""
    grads_S: Tensor
    rank_S: Tensor
    """int64; 0 where a slot is free, or its adapter leaves this kind of module alone."""
    scale_S: Tensor
    """alpha / rank of each slot, fp32."""
    ranks: tuple[int, ...]
    """The ranks there are in `rank_S`, but 0; known on the host."""
    inner: int
    """D."""
    offset: int
    expert_step: int

    @property
    def widest(self) -> int:
        return max(self.ranks, default=0)

    @property
    def places(self) -> tuple[int, int, int]:
        return self.inner, self.offset, self.expert_step
