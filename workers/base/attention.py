"""Attention over packed rows, plugged into transformers' models through its attention interface.

Two forms: `PackedAttention` for whole groups (training, scoring, prefill), `CachedAttention` for
one new token per sequence (decoding).

Suffixes: T rows, H heads, W key/value heads, B sequences, M padded length, X head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from populace.workers.base.rows import PackedRows

# A group's padded length is a function of its own length alone, so its bits don't depend on who it
# runs beside.
LENGTH_STEP = 16


class Attention(Protocol):
    def attend(
        self, layer: int, q_HTX: Tensor, k_WTX: Tensor, v_WTX: Tensor, scaling: float
    ) -> Tensor:
        """[T, H, X]."""


class PackedAttention:
    """Every group attends inside itself: to the prompt, and to the own branch."""

    def __init__(self, rows: PackedRows, keep: bool = False) -> None:
        self.lengths = rows.group_lengths
        self.keep = keep
        self.kept: list[tuple[Tensor, Tensor]] = []
        """With `keep`: each layer's keys and values, [W, T, X]."""
        buckets: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        start = 0
        for length in rows.group_lengths:
            padded = -(-length // LENGTH_STEP) * LENGTH_STEP
            has_branches = bool((rows.branch_T[start : start + length] > 0).any())
            buckets.setdefault((padded, has_branches), []).append((start, length))
            start += length
        self.buckets = [
            _Bucket(padded, members, rows.branch_T, has_branches)
            for (padded, has_branches), members in sorted(buckets.items())
        ]
        order_T = torch.cat([bucket.valid_rows_T for bucket in self.buckets])
        self.inverse_T = torch.empty_like(order_T)
        self.inverse_T[order_T] = torch.arange(len(order_T))

    def attend(
        self, layer: int, q_HTX: Tensor, k_WTX: Tensor, v_WTX: Tensor, scaling: float
    ) -> Tensor:
        if self.keep:
            self.kept.append((k_WTX, v_WTX))
        pieces = []
        for bucket in self.buckets:
            out_BHMX = scaled_dot_product_attention(
                q_HTX[:, bucket.rows_BM].transpose(0, 1),
                k_WTX[:, bucket.rows_BM].transpose(0, 1),
                v_WTX[:, bucket.rows_BM].transpose(0, 1),
                attn_mask=bucket.mask_B1MM,
                is_causal=bucket.mask_B1MM is None,
                scale=scaling,
                enable_gqa=True,
            )
            pieces.append(out_BHMX.transpose(1, 2)[bucket.valid_BM])
        return torch.cat(pieces)[self.inverse_T]


class _Bucket:
    """Groups of one padded length. A single sequence needs no mask: what fills it up comes after
    it."""

    def __init__(
        self, padded: int, members: list[tuple[int, int]], branch_T: Tensor, has_branches: bool
    ) -> None:
        start_B = torch.tensor([start for start, _ in members])
        length_B = torch.tensor([length for _, length in members])
        offset_M = torch.arange(padded)
        self.valid_BM = offset_M < length_B[:, None]
        self.rows_BM = torch.where(self.valid_BM, start_B[:, None] + offset_M, start_B[:, None])
        self.valid_rows_T = self.rows_BM[self.valid_BM]
        self.mask_B1MM: Tensor | None = None
        if not has_branches:
            return
        branch_BM = branch_T[self.rows_BM]
        earlier_MM = offset_M[:, None] >= offset_M[None, :]
        key_B1M = branch_BM[:, None, :]
        visible_BMM = earlier_MM & ((key_B1M == -1) | (key_B1M == branch_BM[:, :, None]))
        visible_BMM &= self.valid_BM[:, None, :]
        # A padding row sees itself, so that its softmax is defined; nobody reads it.
        visible_BMM |= torch.eye(padded, dtype=torch.bool)
        self.mask_B1MM = visible_BMM[:, None]
