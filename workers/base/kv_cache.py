"""Keys and values of sequences that grow, and attention over them for one new token each.

Suffixes: T rows, H heads, W key/value heads, B sequences, M padded length, X head width, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from populace.workers.base.attention import LENGTH_STEP, PackedAttention


class KvCache:
    """Keys and values of sequences that grow. A sequence's room follows from its own prompt and
    limit, so what it attends over has the same shape whoever is decoded beside it."""

    def __init__(self, prefill: PackedAttention, repeats_G: Tensor, new_tokens_G: Tensor) -> None:
        """Caches of the prefilled prompts, each repeated for its samples."""
        lengths_G = torch.tensor(prefill.lengths[: len(repeats_G)], dtype=torch.int64)
        starts_G = lengths_G.cumsum(0) - lengths_G
        owner_U = torch.repeat_interleave(torch.arange(len(lengths_G)), repeats_G)
        room_U = -(-(lengths_G + new_tokens_G)[owner_U] // LENGTH_STEP) * LENGTH_STEP
        self.length_U = lengths_G[owner_U]
        """Tokens of each sequence that have keys; N sequences in all, finished ones included."""
        self.buckets = [
            _CacheBucket(prefill, room, numbers, starts_G[owner_U[numbers]], self.length_U[numbers])
            for room in sorted(set(room_U.tolist()))
            for numbers in [(room_U == room).nonzero().squeeze(1)]
        ]


class _CacheBucket:
    """Sequences of one room: [layers] of [B, W, M, X]."""

    def __init__(
        self,
        prefill: PackedAttention,
        room: int,
        number_B: Tensor,
        start_B: Tensor,
        length_B: Tensor,
    ) -> None:
        self.number_B = number_B
        """Which sequence each row of the cache belongs to."""
        offset_M = torch.arange(int(length_B.max()))
        rows_BM = torch.where(
            offset_M < length_B[:, None], start_B[:, None] + offset_M, start_B[:, None]
        )

        def spread(kept_WTX: Tensor) -> Tensor:
            num_kv, _, width = kept_WTX.shape
            spread_BWMX = kept_WTX.new_zeros(len(number_B), num_kv, room, width)
            spread_BWMX[:, :, : len(offset_M)] = kept_WTX[:, rows_BM].transpose(0, 1)
            return spread_BWMX

        self.keys = [spread(keys) for keys, _ in prefill.kept]
        self.values = [spread(values) for _, values in prefill.kept]
        self.offset_M = torch.arange(room)

    def drop_finished(self, is_live_B: Tensor) -> Tensor:
        """Make room once half of the sequences are done: copying less often costs more than
        attending for them."""
        if int(is_live_B.sum()) * 2 > len(is_live_B):
            return is_live_B
        self.number_B = self.number_B[is_live_B]
        self.keys = [keys[is_live_B] for keys in self.keys]
        self.values = [values[is_live_B] for values in self.values]
        return is_live_B[is_live_B]


class CachedAttention:
    """One new token per running sequence; appends its key and value and attends to all before
    it."""

    def __init__(self, cache: KvCache, running: Sequence[int]) -> None:
        """`running`: the sequence of each row; rows beyond are padding and attend to nothing."""
        row_U = torch.full_like(cache.length_U, -1)
        row_U[torch.tensor(running, dtype=torch.int64)] = torch.arange(len(running))
        self.views = []
        for bucket in cache.buckets:
            is_live_B = bucket.drop_finished(row_U[bucket.number_B] >= 0)
            length_B, place_L = cache.length_U[bucket.number_B], is_live_B.nonzero().squeeze(1)
            mask_B11M = (bucket.offset_M <= length_B[:, None])[:, None, None]
            if len(place_L):
                self.views.append(
                    (bucket, place_L, row_U[bucket.number_B[place_L]], length_B[place_L], mask_B11M)
                )

    def attend(
        self, layer: int, q_HTX: Tensor, k_WTX: Tensor, v_WTX: Tensor, scaling: float
    ) -> Tensor:
        num_kv, num_rows, width = k_WTX.shape
        # Heads that share a key/value head become its queries: no key is repeated in memory.
        q_TWGX = q_HTX.transpose(0, 1).reshape(num_rows, num_kv, -1, width)
        out_TWGX = v_WTX.new_zeros(*q_TWGX.shape[:3], v_WTX.shape[2])
        for bucket, place_L, row_L, length_L, mask_B11M in self.views:
            keys, values = bucket.keys[layer], bucket.values[layer]
            keys[place_L, :, length_L] = k_WTX[:, row_L].transpose(0, 1)
            values[place_L, :, length_L] = v_WTX[:, row_L].transpose(0, 1)
            q_BWGX = q_TWGX.new_zeros(len(keys), *q_TWGX.shape[1:])
            q_BWGX[place_L] = q_TWGX[row_L]
            out_BWGX = scaled_dot_product_attention(
                q_BWGX, keys, values, attn_mask=mask_B11M, scale=scaling
            )
            out_TWGX[row_L] = out_BWGX[place_L]
        return out_TWGX.reshape(num_rows, -1, v_WTX.shape[2])
