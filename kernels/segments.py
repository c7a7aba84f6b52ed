"""Neighbouring rows of one adapter and one expert: what every product of a plan works on.

Suffixes: G segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Neighbouring rows of one adapter (and one expert), in the order of their rows."""

    start_G: Ints
    count_G: Ints
    arena_G: Ints
    slot_G: Ints
    """Row of the arena."""
    expert_G: Ints | None
    """None for dense modules."""

    def index(self, segment_G: Ints) -> slice | tuple[Tensor, ...]:
        """Which tensors of an arena these segments use; a slice where dense ones use neighbouring
        slots in order."""
        slot_G = self.slot_G[segment_G]
        if self.expert_G is None and (np.diff(slot_G) == 1).all():
            return slice(int(slot_G[0]), int(slot_G[-1]) + 1)
        columns = (slot_G,) if self.expert_G is None else (slot_G, self.expert_G[segment_G])
        return tuple(torch.from_numpy(column_G) for column_G in columns)
