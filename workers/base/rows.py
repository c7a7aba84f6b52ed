"""Groups of token sequences become packed rows: no row is spent on padding, a shared prompt is
computed once.

A group is a tree of depth one: its prompt, then one branch per sample. A branch's token attends to
the prompt and to its own branch only, so every branch sees exactly what it would see alone.

Suffixes: T rows, N targets (tokens whose log-probability is wanted), L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from populace.workers.batch import ExpertIds, Ints
from populace.workers.shards.placement import NO_SLOT, SlotAddress


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
        num_masked = int(_gaps(self.prompt_expert_ids, len(self.prompt_ids))[-1]) * len(
            self.branches
        )
        for branch, ids in zip(self.branches, ids_of, strict=True):
            num_fed = len(branch) - 1
            num_masked += int(_gaps(None if ids is None else ids[:num_fed], num_fed).sum())
        return sum(map(len, self.branches)) - num_masked


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Rows sorted by (address, group, branch, position). Padding to a multiple of rows comes last,
    as one more group without an adapter."""

    token_T: Tensor
    position_T: Tensor
    arena_T: Tensor
    slot_T: Tensor
    branch_T: Tensor
    """-1 for prompt rows."""
    group_lengths: tuple[int, ...]
    expert_ids_TLK: Tensor | None
    """Selection to replay; -1 routes natively."""
    target_row_N: Tensor
    target_token_N: Tensor
    target_masked_N: Tensor
    """True where the row that predicts this token had routing that couldn't be mapped (R3: out of
    the loss)."""
    temperature_N: Tensor
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
    """Rows of all groups, which must be sorted by address. `routing_shape` is (L, K) where any group brings expert
    ids."""
    # A shard that has no rows of its own still runs along with the others.
    missing = -sum(group.num_rows for group in groups) % row_multiple if groups else row_multiple
    if missing:
        padding = SequenceGroup(
            address=NO_SLOT, prompt_ids=np.zeros(missing, np.int32), branches=()
        )
        groups = [*groups, padding]
    tokens, positions, branches, slots, lengths = [], [], [], [], []
    expert_ids, masked_rows, target_rows, target_tokens, target_counts, temperatures = (
        [],
        [],
        [],
        [],
        [],
        [],
    )
    start = 0
    for group in groups:
        num_prompt = len(group.prompt_ids)
        tokens.append(group.prompt_ids)
        positions.append(np.arange(num_prompt))
        branches.append(np.full(num_prompt, -1))
        expert_ids.append(_ids_or_native(group.prompt_expert_ids, num_prompt, routing_shape))
        # Native routing of a whole sequence is a choice; an unknown row inside a record is a gap.
        masked_rows.append(_gaps(group.prompt_expert_ids, num_prompt))
        row = start + num_prompt
        ids_of = group.branch_expert_ids or (None,) * len(group.branches)
        for index, (branch, ids) in enumerate(zip(group.branches, ids_of, strict=True)):
            fed = branch[:-1]
            tokens.append(fed)
            positions.append(num_prompt + np.arange(len(fed)))
            branches.append(np.full(len(fed), index))
            expert_ids.append(
                _ids_or_native(None if ids is None else ids[: len(fed)], len(fed), routing_shape)
            )
            masked_rows.append(_gaps(None if ids is None else ids[: len(fed)], len(fed)))
            target_rows.append(
                np.concatenate([[start + num_prompt - 1], np.arange(row, row + len(fed))])
            )
            target_tokens.append(branch)
            target_counts.append(len(branch))
            temperatures.append(np.full(len(branch), group.temperature, dtype=np.float32))
            row += len(fed)
        lengths.append(row - start)
        slots.append(np.tile(np.asarray(group.address), (row - start, 1)))
        start = row
    slot_T2 = torch.from_numpy(np.concatenate(slots))
    target_row_N = _ints(target_rows)
    masked_T = torch.from_numpy(np.concatenate(masked_rows))
    return PackedRows(
        token_T=_ints(tokens),
        position_T=_ints(positions),
        arena_T=slot_T2[:, 0].contiguous(),
        slot_T=slot_T2[:, 1].contiguous(),
        branch_T=_ints(branches),
        group_lengths=tuple(lengths),
        expert_ids_TLK=None if routing_shape is None else _ints(expert_ids),
        target_row_N=target_row_N,
        target_token_N=_ints(target_tokens),
        target_masked_N=masked_T[target_row_N],
        temperature_N=torch.from_numpy(np.concatenate(temperatures or [np.zeros(0, np.float32)])),
        target_counts=tuple(target_counts),
    )


def _ints(arrays: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.generic]]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays or [np.zeros(0)]).astype(np.int64))


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
