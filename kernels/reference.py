"""The truth: grouped products as plain loops over segments. Slow, obvious, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from populace.kernels.tiles import ArenaSegments


def grouped_rows(x_TD: Tensor, w_GDF: Tensor, segments: ArenaSegments) -> Tensor:
    """y[rows of g] = x[rows of g] @ w[g]. Rows lie group by group; `segments.ends_G` says where each ends."""
    pieces, start = [], 0
    for group, end in enumerate(segments.ends_G.tolist()):
        pieces.append(x_TD[start:end] @ w_GDF[group])
        start = end
    return torch.cat(pieces) if pieces else x_TD.new_zeros(0, w_GDF.shape[-1])


def grouped_outer(x_TD: Tensor, y_TF: Tensor, segments: ArenaSegments) -> Tensor:
    """z[g] = x[rows of g]ᵀ @ y[rows of g]: [G, D, F]; zero for a group without rows."""
    pieces, start = [], 0
    for end in segments.ends_G.tolist():
        pieces.append(x_TD[start:end].T @ y_TF[start:end])
        start = end
    return torch.stack(pieces) if pieces else x_TD.new_zeros(0, x_TD.shape[-1], y_TF.shape[-1])
