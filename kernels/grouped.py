"""The same products in one call for all segments: `grouped_mm` for large ones, a padded `bmm` for many small
ones, whose cost per group would dominate (decoding: a few rows per adapter)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from populace.kernels.tiles import ArenaSegments

SMALL_GROUP_ROWS = 24


def grouped_rows(x_TD: Tensor, w_GDF: Tensor, segments: ArenaSegments) -> Tensor:
    """See `reference.grouped_rows`."""
    if len(x_TD) >= SMALL_GROUP_ROWS * len(w_GDF):
        return grouped_mm(x_TD.contiguous(), w_GDF, offs=segments.ends_G)
    rows_GM, place_T = segments.padded
    return torch.bmm(x_TD[rows_GM], w_GDF).flatten(0, 1)[place_T]


def grouped_outer(x_TD: Tensor, y_TF: Tensor, segments: ArenaSegments) -> Tensor:
    """See `reference.grouped_outer`."""
    return grouped_mm(x_TD.contiguous().T, y_TF.contiguous(), offs=segments.ends_G)
