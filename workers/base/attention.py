"""Attention over packed rows, plugged into transformers' models through its attention interface.

Two forms: `PackedAttention` for whole groups (training, scoring, prefill), `CachedAttention` for
one new token per sequence (decoding).

Suffixes: T rows, H heads, W key/value heads, B sequences, M padded length, X head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from populace.workers.base.rows import PackedRows

Bools = np.ndarray[tuple[int, ...], np.dtype[Any]]

# A group's padded length is a function of its own length alone, so its bits don't depend on who it
# runs beside.
LENGTH_STEP = 16


class Attention(Protocol):
    def attend(
        self, layer: int, q_HTX: Tensor, k_WTX: Tensor, v_WTX: Tensor, scaling: float
    ) -> Tensor:
        """[T, H, X]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Groups of one padded length. A single sequence needs no mask: its padding comes after it."""

    rows_BM: Tensor
    """The row at each place; padding is the group's first."""
    mask_B1MM: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Which rows attend to which. Made on the host from the rows alone, uploaded with them."""

    buckets: tuple[Bucket, ...]
    place_T: Tensor
    """Where each row lies among the places of all buckets."""

    @staticmethod
    def of(rows: PackedRows) -> AttentionPlan:
        """Every group attends inside itself: to the prompt, and to the own branch."""
        branch_T = rows.branch_T.numpy()
        members: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        start = 0
        for length in rows.group_lengths:
            padded = -(-length // LENGTH_STEP) * LENGTH_STEP
            has_branches = bool((branch_T[start : start + length] > 0).any())
            members.setdefault((padded, has_branches), []).append((start, length))
            start += length
        place_T = np.empty(rows.num_rows, np.int64)
        buckets, num_places = [], 0
        for (padded, has_branches), own in sorted(members.items()):
            start_B, length_B = np.array(own).T
            offset_M = np.arange(padded)
            is_row_BM = offset_M < length_B[:, None]
            rows_BM = np.where(is_row_BM, start_B[:, None] + offset_M, start_B[:, None])
            place_T[rows_BM[is_row_BM]] = num_places + np.flatnonzero(is_row_BM)
            num_places += rows_BM.size
            mask_BMM = _visible(branch_T[rows_BM], is_row_BM) if has_branches else None
            buckets.append(
                Bucket(
                    rows_BM=torch.from_numpy(rows_BM),
                    mask_B1MM=None if mask_BMM is None else torch.from_numpy(mask_BMM[:, None]),
                )
            )
        return AttentionPlan(buckets=tuple(buckets), place_T=torch.from_numpy(place_T))


def _visible(branch_BM: Bools, is_row_BM: Bools) -> Bools:
    """[B, M, M]: which keys each query sees."""
    offset_M = np.arange(branch_BM.shape[1])
    earlier_MM = offset_M[:, None] >= offset_M[None, :]
    key_B1M = branch_BM[:, None, :]
    visible_BMM: Bools = earlier_MM & ((key_B1M == -1) | (key_B1M == branch_BM[:, :, None]))
    visible_BMM &= is_row_BM[:, None, :]
    # A padding row sees itself, so that its softmax is defined; nobody reads it.
    visible_BMM |= np.eye(len(offset_M), dtype=np.bool_)
    return visible_BMM


class PackedAttention:
    """Attention of whole groups, by a plan that lies where the rows are."""

    def __init__(self, plan: AttentionPlan, keep: bool = False) -> None:
        self.plan, self.keep = plan, keep
        self.kept: list[tuple[Tensor, Tensor]] = []
        """With `keep`: each layer's keys and values, [W, T, X]."""

    def attend(
        self, layer: int, q_HTX: Tensor, k_WTX: Tensor, v_WTX: Tensor, scaling: float
    ) -> Tensor:
        if self.keep:
            self.kept.append((k_WTX, v_WTX))
        pieces = []
        for bucket in self.plan.buckets:
            out_BHMX = scaled_dot_product_attention(
                q_HTX[:, bucket.rows_BM].transpose(0, 1),
                k_WTX[:, bucket.rows_BM].transpose(0, 1),
                v_WTX[:, bucket.rows_BM].transpose(0, 1),
                attn_mask=bucket.mask_B1MM,
                is_causal=bucket.mask_B1MM is None,
                scale=scaling,
                enable_gqa=True,
            )
            pieces.append(out_BHMX.transpose(1, 2).flatten(0, 1))
        return torch.cat(pieces)[self.plan.place_T]
