"""Attention over packed rows, plugged into transformers' models through its attention interface.

Two forms: `PackedAttention` for whole groups (training, scoring, prefill), `CachedAttention` for one new token
per sequence (decoding).

Suffixes: T rows, H heads, W key/value heads, B sequences, M padded length, X head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from populace.workers.rows import PackedRows

# A group's padded length is a function of its own length alone, so its bits don't depend on who it runs beside.
LENGTH_STEP = 16


class Attention(Protocol):
    def attend(self, layer: int, q_HTX: Tensor, k_WTX: Tensor, v_WTX: Tensor, scaling: float) -> Tensor:
        """[T, H, X]."""


class KvCache:
    """Keys and values of B sequences, [layers][B, W, M, X]."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], length_B: Tensor) -> None:
        self.keys, self.values, self.length_B = keys, values, length_B

    @staticmethod
    def from_prefill(prefill: PackedAttention, repeats_G: Tensor, max_new_tokens: int) -> KvCache:
        """Caches of the prefilled prompts, each repeated for its samples, with room for the completions."""
        lengths_G = torch.tensor(prefill.lengths)
        owner_B = torch.repeat_interleave(torch.arange(len(lengths_G)), repeats_G)
        ends_G = lengths_G.cumsum(0)
        offset_M = torch.arange(int(lengths_G.max()))
        rows_BM = ((ends_G - lengths_G)[owner_B, None] + offset_M).clamp(max=int(ends_G[-1]) - 1)

        def spread(kept_WTX: Tensor) -> Tensor:
            num_kv, _, width = kept_WTX.shape
            num_sequences, longest = rows_BM.shape
            spread_BWMX = kept_WTX.new_zeros(num_sequences, num_kv, longest + max_new_tokens, width)
            spread_BWMX[:, :, :longest] = kept_WTX[:, rows_BM].transpose(0, 1)
            return spread_BWMX

        return KvCache(
            [spread(keys) for keys, _ in prefill.kept],
            [spread(values) for _, values in prefill.kept],
            lengths_G[owner_B],
        )

    def select(self, keep_B: Tensor) -> None:
        self.keys = [keys[keep_B] for keys in self.keys]
        self.values = [values[keep_B] for values in self.values]
        self.length_B = self.length_B[keep_B]


class PackedAttention:
    """Every group attends inside itself: to the prompt, and to the own branch."""

    def __init__(self, rows: PackedRows, keep: bool = False) -> None:
        self.lengths = rows.group_lengths
        self.keep = keep
        self.kept: list[tuple[Tensor, Tensor]] = []
        """With `keep`: each layer's keys and values, [W, T, X]."""
        buckets: dict[int, list[tuple[int, int]]] = {}
        start = 0
        for length in rows.group_lengths:
            padded = -(-length // LENGTH_STEP) * LENGTH_STEP
            buckets.setdefault(padded, []).append((start, length))
            start += length
        self.buckets = [_Bucket(padded, members, rows.branch_T) for padded, members in sorted(buckets.items())]
        order_T = torch.cat([bucket.valid_rows_T for bucket in self.buckets])
        self.inverse_T = torch.empty_like(order_T)
        self.inverse_T[order_T] = torch.arange(len(order_T))

    def attend(self, layer: int, q_HTX: Tensor, k_WTX: Tensor, v_WTX: Tensor, scaling: float) -> Tensor:
        if self.keep:
            self.kept.append((k_WTX, v_WTX))
        pieces = []
        for bucket in self.buckets:
            out_BHMX = scaled_dot_product_attention(
                q_HTX[:, bucket.rows_BM].transpose(0, 1),
                k_WTX[:, bucket.rows_BM].transpose(0, 1),
                v_WTX[:, bucket.rows_BM].transpose(0, 1),
                attn_mask=bucket.mask_B1MM,
                scale=scaling,
                enable_gqa=True,
            )
            pieces.append(out_BHMX.transpose(1, 2)[bucket.valid_BM])
        return torch.cat(pieces)[self.inverse_T]


class _Bucket:
    """Groups of one padded length."""

    def __init__(self, padded: int, members: list[tuple[int, int]], branch_T: Tensor) -> None:
        start_B = torch.tensor([start for start, _ in members])
        length_B = torch.tensor([length for _, length in members])
        offset_M = torch.arange(padded)
        self.valid_BM = offset_M < length_B[:, None]
        self.rows_BM = torch.where(self.valid_BM, start_B[:, None] + offset_M, start_B[:, None])
        self.valid_rows_T = self.rows_BM[self.valid_BM]
        branch_BM = branch_T[self.rows_BM]
        earlier_MM = offset_M[:, None] >= offset_M[None, :]
        key_B1M = branch_BM[:, None, :]
        visible_BMM = earlier_MM & ((key_B1M == -1) | (key_B1M == branch_BM[:, :, None]))
        visible_BMM &= self.valid_BM[:, None, :]
        # A padding row sees itself, so that its softmax is defined; nobody reads it.
        visible_BMM |= torch.eye(padded, dtype=torch.bool)
        self.mask_B1MM = visible_BMM[:, None]


class CachedAttention:
    """One new token per sequence; appends its key and value and attends to all before it."""

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        length_B = cache.length_B
        self.index_B = torch.arange(len(length_B))
        self.longest = int(length_B.max()) + 1
        self.mask_B11M = (torch.arange(self.longest) <= length_B[:, None])[:, None, None, :]

    def attend(self, layer: int, q_HTX: Tensor, k_WTX: Tensor, v_WTX: Tensor, scaling: float) -> Tensor:
        cache, length_B = self.cache, self.cache.length_B
        cache.keys[layer][self.index_B, :, length_B] = k_WTX.transpose(0, 1)
        cache.values[layer][self.index_B, :, length_B] = v_WTX.transpose(0, 1)
        num_kv, num_rows, width = k_WTX.shape
        # Heads that share a key/value head become its queries: no key is repeated in memory.
        q_BWGX = q_HTX.transpose(0, 1).reshape(num_rows, num_kv, -1, width)
        out_BWGX = scaled_dot_product_attention(
            q_BWGX,
            cache.keys[layer][:, :, : self.longest],
            cache.values[layer][:, :, : self.longest],
            attn_mask=self.mask_B11M,
            scale=scaling,
        )
        return out_BWGX.reshape(num_rows, -1, width)
