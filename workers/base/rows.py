"""Groups of token sequences become packed rows: no row is spent on padding, a shared prompt is
computed once.

A group is a tree of depth one: its prompt, then one branch per sample. A branch's token attends to
the prompt and to its own branch only, so every branch sees exactly what it would see alone.

Suffixes: T rows, N targets (tokens whose log-probability is wanted), L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from populace.workers.batch import ExpertIds, Ints
from populace.workers.shards.placement import NO_SLOT, SlotAddress

Column = np.ndarray[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceGroup:
    """Input of `pack_rows`: a prompt and its branches. The last token of a branch predicts nothing
    and is not fed, so it has no row."""

    address: SlotAddress
    """`NO_SLOT` for the base alone."""
    prompt_ids: Ints
    branches: tuple[Ints, ...]
    prompt_expert_ids: ExpertIds | None = None
    branch_expert_ids: tuple[ExpertIds | None, ...] = ()
    temperature: float = 1.0

    @property
    def num_rows(self) -> int:
        return len(self.prompt_ids) + sum(max(len(branch) - 1, 0) for branch in self.branches)

    @property
    def num_targets(self) -> int:
        """Tokens that count: those whose predicting row has routing that could be mapped."""
        ids_of = self.branch_expert_ids or (None,) * len(self.branches)
        is_last_unknown = bool(_gaps(self.prompt_expert_ids, len(self.prompt_ids))[-1])
        num_masked = is_last_unknown * len(self.branches)
        for branch, ids in zip(self.branches, ids_of, strict=True):
            num_fed = len(branch) - 1
            num_masked += int(_gaps(None if ids is None else ids[:num_fed], num_fed).sum())
        return sum(map(len, self.branches)) - num_masked


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Rows sorted by (address, group, branch, position). Padding to a multiple of rows comes last,
    as one more group without an adapter. Packed on the host, uploaded for a pass."""

    token_T: Tensor
    position_T: Tensor
    arena_T: Tensor
    slot_T: Tensor
    branch_T: Tensor
    """-1 for prompt rows."""
    group_lengths: tuple[int, ...]
    has_adapters: bool
    """Whether any row has one."""
    expert_ids_TLK: Tensor | None
    """Selection to replay, int16; -1 routes natively."""
    target_row_N: Tensor
    target_token_N: Tensor
    target_masked_N: Tensor
    """True where the row that predicts this token had routing that couldn't be mapped (R3: out of
    the loss)."""
    temperature_N: Tensor
    target_rounds: tuple[tuple[Tensor, Tensor], ...]
    """(rows, targets): targets whose rows differ, first each row's first, then its second: what is
    added to rows in this order has one order of additions."""
    target_counts: tuple[int, ...]
    """Targets of each branch, in the order of the groups' branches."""

    @property
    def num_rows(self) -> int:
        return len(self.token_T)


def pack_rows(
    groups: Sequence[SequenceGroup],
    routing_shape: tuple[int, int] | None = None,
    row_multiple: int = 1,
) -> PackedRows:
    """Rows of all groups, which must be sorted by address. `routing_shape` is (L, K) where any
    group brings expert ids."""
    # A shard that has no rows of its own still runs along with the others.
    missing = -sum(group.num_rows for group in groups) % row_multiple if groups else row_multiple
    if missing:
        padding = SequenceGroup(
            address=NO_SLOT, prompt_ids=np.zeros(missing, np.int32), branches=()
        )
        groups = [*groups, padding]
    columns = _Columns(routing_shape)
    for group in groups:
        columns.add(group)
    return columns.packed()


class _Columns:
    """The columns of `PackedRows` while groups are added, one piece per prompt or branch."""

    def __init__(self, routing_shape: tuple[int, int] | None) -> None:
        self._routing_shape, self._num_rows = routing_shape, 0
        self._tokens: list[Column] = []
        self._positions: list[Column] = []
        self._branches: list[Column] = []
        self._slots: list[Column] = []
        self._expert_ids: list[Column] = []
        self._masked: list[Column] = []
        self._lengths: list[int] = []
        self._target_rows: list[Column] = []
        self._target_tokens: list[Column] = []
        self._target_counts: list[int] = []
        self._temperatures: list[Column] = []

    def add(self, group: SequenceGroup) -> None:
        """The prompt, then branch by branch what is fed back: all tokens but the last."""
        start, num_prompt = self._num_rows, len(group.prompt_ids)
        self._add_rows(group.prompt_ids, np.arange(num_prompt), -1, group.prompt_expert_ids)
        ids_of = group.branch_expert_ids or (None,) * len(group.branches)
        for index, (branch, ids) in enumerate(zip(group.branches, ids_of, strict=True)):
            fed, row = branch[:-1], self._num_rows
            # A branch's first token is told from the prompt's last row.
            rows = np.concatenate([[start + num_prompt - 1], np.arange(row, row + len(fed))])
            self._target_rows.append(rows)
            self._target_tokens.append(branch)
            self._target_counts.append(len(branch))
            self._temperatures.append(np.full(len(branch), group.temperature, np.float32))
            known = None if ids is None else ids[: len(fed)]
            self._add_rows(fed, num_prompt + np.arange(len(fed)), index, known)
        length = self._num_rows - start
        self._lengths.append(length)
        self._slots.append(np.tile(np.asarray(group.address), (length, 1)))

    def _add_rows(
        self, tokens: Column, positions: Column, branch: int, expert_ids: ExpertIds | None
    ) -> None:
        count = len(tokens)
        self._tokens.append(tokens)
        self._positions.append(positions)
        self._branches.append(np.full(count, branch))
        self._expert_ids.append(_ids_or_native(expert_ids, count, self._routing_shape))
        # Native routing of a whole sequence is a choice; an unknown row inside a record is a gap.
        self._masked.append(_gaps(expert_ids, count))
        self._num_rows += count

    def packed(self) -> PackedRows:
        slot_T2 = torch.from_numpy(np.concatenate(self._slots))
        target_row_N = _ints(self._target_rows)
        masked_T = torch.from_numpy(np.concatenate(self._masked))
        temperatures = self._temperatures or [np.zeros(0, np.float32)]
        return PackedRows(
            token_T=_ints(self._tokens),
            position_T=_ints(self._positions),
            arena_T=slot_T2[:, 0].contiguous(),
            slot_T=slot_T2[:, 1].contiguous(),
            branch_T=_ints(self._branches),
            group_lengths=tuple(self._lengths),
            has_adapters=bool((slot_T2 >= 0).any()),
            expert_ids_TLK=None
            if self._routing_shape is None
            else torch.from_numpy(np.concatenate(self._expert_ids).astype(np.int16)),
            target_row_N=target_row_N,
            target_rounds=tuple(_rounds(target_row_N.numpy())),
            target_token_N=_ints(self._target_tokens),
            target_masked_N=masked_T[target_row_N],
            temperature_N=torch.from_numpy(np.concatenate(temperatures)),
            target_counts=tuple(self._target_counts),
        )


def _ints(arrays: Sequence[Column]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays or [np.zeros(0)]).astype(np.int64))


def _rounds(row_N: Column) -> Iterator[tuple[Tensor, Tensor]]:
    """See `PackedRows.target_rounds`."""
    order_N = np.argsort(row_N, kind="stable")
    sorted_N = row_N[order_N]
    first_N = np.searchsorted(sorted_N, sorted_N)
    round_N = np.arange(len(row_N)) - first_N
    for number in range(int(round_N.max(initial=-1)) + 1):
        target_M = np.sort(order_N[round_N == number])
        yield torch.from_numpy(row_N[target_M]), torch.from_numpy(target_M)


def _ids_or_native(
    ids: ExpertIds | None, num_rows: int, routing_shape: tuple[int, int] | None
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    if ids is not None and routing_shape is not None:
        return ids
    return np.full((num_rows, *(routing_shape or (0, 0))), -1)


def _gaps(ids: ExpertIds | None, num_rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    if ids is None:
        return np.zeros(num_rows, dtype=np.bool_)
    gaps: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = np.asarray((ids < 0).any(axis=(1, 2)))
    return gaps
