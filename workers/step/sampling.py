"""The draw of a token: inverse transform sampling with a sample's own numbers.

Suffixes: B sequences, V vocabulary, K blocks, W width of a block.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from populace.workers.adapters.slab import Slab
from populace.workers.batch import RolloutRequest

_BLOCK = 256


def inverse_transform(prob_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token whose interval of the cumulated probabilities holds the draw, [B]. Two levels,
    because a plain cumulated sum over a vocabulary takes longer than its softmax: first the block,
    then the token inside."""
    num_tokens = prob_BV.shape[1]
    missing = -num_tokens % _BLOCK
    prob_BKW = (pad(prob_BV, (0, missing)) if missing else prob_BV).view(len(prob_BV), -1, _BLOCK)
    blocks_BK = prob_BKW.sum(-1).double().cumsum(1)
    # The last sum is 1 only up to rounding: scale the draw to it, so that no draw falls off the
    # end.
    draw_B1 = (uniform_B * blocks_BK[:, -1]).unsqueeze(1)
    block_B1 = torch.searchsorted(blocks_BK, draw_B1, right=True).clamp(max=blocks_BK.shape[1] - 1)
    before_B1 = torch.where(block_B1 > 0, blocks_BK.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    inside_BW = prob_BKW.take_along_dim(block_B1.unsqueeze(2), 1).squeeze(1).double().cumsum(1)
    # Rounding between the two levels must not step onto a token of probability zero.
    draw_B1 = torch.minimum(draw_B1 - before_B1, inside_BW[:, -1:] * (1 - 1e-12))
    place_B1 = torch.searchsorted(inside_BW, draw_B1, right=True).clamp(max=_BLOCK - 1)
    return (block_B1 * _BLOCK + place_B1).squeeze(1).clamp(max=num_tokens - 1)


def uniforms_of(
    slab: Slab, request: RolloutRequest, sample: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """One number in [0, 1) per position."""
    name = (
        f"{slab.slots[request.adapter].seed}/{request.adapter.revision}/{request.event_id}/{sample}"
    )
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "big")
    return np.random.Generator(np.random.Philox(key=key)).random(request.max_new_tokens)
