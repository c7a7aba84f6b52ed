"""Keys and values of sequences that grow, and attention over them for one new token each.

Which sequence is where is the host's to know; the keys and values are where the shard computes.

Suffixes: T rows, H heads, W key/value heads, U sequences (finished ones included), B sequences of a
bucket, L those of them that still run, M padded length, X head width, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from populace.workers.base.attention import LENGTH_STEP, PackedAttention
from populace.workers.device import Device

Ints = NDArray[np.int64]


class KvCache:
    """Keys and values of sequences that grow. A sequence's room follows from its own prompt and
    limit, so what it attends over has the same shape whoever is decoded beside it."""

    def __init__(
        self,
        prefill: PackedAttention,
        lengths_G: Ints,
        repeats_G: Ints,
        new_tokens_G: Ints,
        device: Device,
    ) -> None:
        """Caches of the prefilled prompts, each repeated for its samples. `prefill` keeps nothing
        of them."""
        starts_G = lengths_G.cumsum() - lengths_G
        owner_U = np.repeat(np.arange(len(lengths_G)), repeats_G)
        room_U = -(-(lengths_G + new_tokens_G)[owner_U] // LENGTH_STEP) * LENGTH_STEP
        self.length_U: Ints = lengths_G[owner_U]
        """Tokens of each sequence that have keys."""
        self.buckets = [
            _CacheBucket(
                prefill,
                int(room),
                numbers,
                starts_G[owner_U[numbers]],
                self.length_U[numbers],
                device,
            )
            for room in np.unique(room_U)
            for numbers in [np.flatnonzero(room_U == room)]
        ]
        prefill.kept.clear()


class _CacheBucket:
    """Sequences of one room: [layers] of [B, W, M, X]."""

    def __init__(
        self,
        prefill: PackedAttention,
        room: int,
        number_B: Ints,
        start_B: Ints,
        length_B: Ints,
        device: Device,
    ) -> None:
        self.number_B = number_B
        """Which sequence each row of the cache belongs to."""
        self._device = device
        offset_M = np.arange(int(length_B.max()))
        rows_BM = np.where(
            offset_M < length_B[:, None], start_B[:, None] + offset_M, start_B[:, None]
        )
        there_BM, self.offset_M = device.upload(torch.from_numpy(rows_BM), torch.arange(room))

        def spread(kept_WTX: Tensor) -> Tensor:
            num_kv, _, width = kept_WTX.shape
            spread_BWMX = kept_WTX.new_zeros(len(number_B), num_kv, room, width)
            spread_BWMX[:, :, : len(offset_M)] = kept_WTX[:, there_BM].transpose(0, 1)
            return spread_BWMX

        self.keys = [spread(keys) for keys, _ in prefill.kept]
        self.values = [spread(values) for _, values in prefill.kept]

    def drop_finished(self, is_live_B: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Make room once half of the sequences are done: copying less often costs more than
        attending for them."""
        if int(is_live_B.sum()) * 2 > len(is_live_B):
            return is_live_B
        self.number_B = self.number_B[is_live_B]
        (live_L,) = self._device.upload(torch.from_numpy(np.flatnonzero(is_live_B)))
        self.keys = [keys.index_select(0, live_L) for keys in self.keys]
        self.values = [values.index_select(0, live_L) for values in self.values]
        return is_live_B[is_live_B]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBucket:
    """Which running sequences are in one bucket of a cache."""

    place_L: Tensor
    """Their places in the bucket."""
    row_L: Tensor
    """Their rows in the pass."""
    length_L: Tensor
    """Where the new key goes."""
    length_B: Tensor
    """Up to where each place of the bucket attends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """One step of decoding. Made on the host, uploaded with the step's rows."""

    buckets: tuple[DecodeBucket | None, ...]
    """None for one of which nothing runs."""

    @staticmethod
    def of(cache: KvCache, running: Sequence[int]) -> DecodePlan:
        """`running`: the sequence of each row; rows beyond are padding and attend to nothing. May
        make the cache smaller."""
        row_U = np.full_like(cache.length_U, -1)
        row_U[list(running)] = np.arange(len(running))
        buckets: list[DecodeBucket | None] = []
        for bucket in cache.buckets:
            is_live_B = bucket.drop_finished(row_U[bucket.number_B] >= 0)
            length_B, place_L = cache.length_U[bucket.number_B], np.flatnonzero(is_live_B)
            columns = (place_L, row_U[bucket.number_B[place_L]], length_B[place_L], length_B)
            there = map(torch.from_numpy, columns)
            names = ("place_L", "row_L", "length_L", "length_B")
            buckets.append(
                DecodeBucket(**dict(zip(names, there, strict=True))) if len(place_L) else None
            )
        return DecodePlan(buckets=tuple(buckets))


class CachedAttention:
    """One new token per running sequence; appends its key and value and attends to all before
    it."""

    def __init__(self, cache: KvCache, plan: DecodePlan) -> None:
        """`plan`: uploaded."""
        self.views = [
            (bucket, own, (bucket.offset_M <= own.length_B[:, None])[:, None, None])
            for bucket, own in zip(cache.buckets, plan.buckets, strict=True)
            if own is not None
        ]

    def attend(
        self, layer: int, q_HTX: Tensor, k_WTX: Tensor, v_WTX: Tensor, scaling: float
    ) -> Tensor:
        num_kv, num_rows, width = k_WTX.shape
        # Heads that share a key/value head become its queries: no key is repeated in memory.
        q_TWGX = q_HTX.transpose(0, 1).reshape(num_rows, num_kv, -1, width)
        out_TWGX = v_WTX.new_zeros(*q_TWGX.shape[:3], v_WTX.shape[2])
        for bucket, own, mask_B11M in self.views:
            keys, values = bucket.keys[layer], bucket.values[layer]
            keys[own.place_L, :, own.length_L] = k_WTX[:, own.row_L].transpose(0, 1)
            values[own.place_L, :, own.length_L] = v_WTX[:, own.row_L].transpose(0, 1)
            q_BWGX = q_TWGX.new_zeros(len(keys), *q_TWGX.shape[1:])
            q_BWGX[own.place_L] = q_TWGX[own.row_L]
            out_BWGX = scaled_dot_product_attention(
                q_BWGX, keys, values, attn_mask=mask_B11M, scale=scaling
            )
            out_TWGX[own.row_L] = out_BWGX[own.place_L]
        return out_TWGX.reshape(num_rows, -1, v_WTX.shape[2])
