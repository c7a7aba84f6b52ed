"""The fused step: one forward, backward and optimizer step for every adapter of a wave. Free of
Ray.

What depends on one adapter alone stays so: its loss denominator, clipping, step counter, learning
rates and moments. A wave that is too large for memory runs in passes; see `lessons.py`.

Every shard of a group runs this with the same batch: it plans all passes, and puts into each the
rows of those adapters whose home it is. A shard without any runs along with padding, because rows
of the others come to its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from populace.configs.schema import OptimizerSettings, TrainSettings
from populace.workers.adapters.slab import Dump, Slab
from populace.workers.base.forward import ForwardPass, Kernels
from populace.workers.base.logprobs import token_logprobs
from populace.workers.base.model import BaseModel
from populace.workers.base.rows import pack_rows
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    ExperienceKind,
    ShardStep,
    ShardUpdate,
    UpdateStatus,
    WaveBatch,
)
from populace.workers.device import Download
from populace.workers.step.lessons import Lesson, Share, lesson_of, plan_passes
from populace.workers.step.losses import WeightedGroup, token_losses
from populace.workers.step.optimizer import update_adapters


@dataclass(slots=True)
class _Tally:
    """What the passes said about one adapter."""

    loss: float = 0.0
    largest_gap: float = -np.inf
    """Sums over log-probabilities of rollout and trainer."""
    kl: float = 0.0
    """Sum over the tokens that have a log-probability from rollout; see `_divergence`."""
    num_compared: int = 0
    num_masked: int = 0
    """Tokens out of the loss because their routing could not be mapped."""
    num_tokens: int = 0


@dataclass(slots=True)
class _Passes:
    """Sums over all passes of a wave."""

    tallies: dict[AdapterKey, _Tally] = field(default_factory=dict)
    """Tallies of the adapters whose home is here."""
    num_rows: int = 0
    said: list[_PassResult] = field(default_factory=list)
    """What is on its way from the device, read once the last pass is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _PassResult:
    """What a pass says of its tokens and of its routing."""

    shares: Sequence[Share]
    masked_N: NDArray[np.bool_]
    download: Download
    """Loss [N], trainer's log-probability minus the rollout's [N] (NaN where unknown), and per MoE
    layer replayed selections and those of them that the trainer would have made otherwise [L, 2];
    nothing of tokens where there are none, nothing of routing where none is replayed."""
    has_tokens: bool


def train_wave(
    base: BaseModel,
    slab: Slab,
    batch: WaveBatch,
    train: TrainSettings,
    optimizer: OptimizerSettings,
    kernels: Kernels,
) -> ShardStep:
    """Update every adapter of the batch in its slot and return what is new on this shard (it may
    share the slab's memory).

    An adapter without signal, or with a gradient that is not finite, keeps its weights and moments
    bit for bit and says so in its status; the others go on.
    """
    lessons = {item.adapter: lesson_of(slab, item, train) for item in batch.adapters}
    taught = [lesson for lesson in lessons.values() if lesson.groups]
    done = _Passes()
    homes = {lesson.key: slab.shard.home_of(lesson.address) for lesson in taught}
    for turn, shares in plan_passes(taught, train.max_rows_per_pass, homes):
        own = [share for share in shares if slab.shard.is_home(share.lesson.address)]
        _forward_backward(base, slab, own, train, kernels, done, accumulates=turn > 0)
    norms = update_adapters(slab, [lesson.key for lesson in taught], optimizer, base.exchange)
    dumps = {
        item.adapter: _take_over(slab, lessons[item.adapter], norms.get(item.adapter))
        for item in batch.adapters
    }
    route_counts = sum((_add_up(done, said) for said in done.said), np.zeros(2))
    updates = tuple(
        _update(
            slab,
            item,
            *dumps[item.adapter],
            done.tallies.get(item.adapter),
            norms.get(item.adapter),
        )
        for item in batch.adapters
    )
    for update in updates:
        slab.end_training(update.adapter, is_updated=update.status is UpdateStatus.UPDATED)
    counts = base.exchange.all_reduce(torch.from_numpy(route_counts))
    replayed, otherwise = counts.tolist()
    return ShardStep(
        updates=updates, num_rows=done.num_rows, out_of_route=(int(otherwise), int(replayed))
    )


def _forward_backward(
    base: BaseModel,
    slab: Slab,
    shares: Sequence[Share],
    train: TrainSettings,
    kernels: Kernels,
    done: _Passes,
    *,
    accumulates: bool,
) -> None:
    """One pass with this shard's shares; leaves gradients in the slab and its sums in `done`. The
    host waits for nothing in it."""
    sequences = [sequence for share in shares for sequence in share.sequences]
    rows = pack_rows(sequences, base.routing_shape, kernels.row_multiple)
    forward_pass = ForwardPass.packed(rows, slab, kernels, accumulates=accumulates)
    logprob_N = token_logprobs(base, base.hidden(forward_pass), forward_pass)
    said = [torch.stack(forward_pass.route_counts)] if forward_pass.route_counts else []
    done.num_rows += rows.num_rows
    if not sequences:
        logprob_N.sum().backward()  # type: ignore[no-untyped-call]
    else:
        # Every token's loss over its own adapter's denominator; masked tokens count nothing.
        (columns,) = kernels.device.upload(_columns_of(shares))
        loss_N = token_losses(
            logprob_N,
            columns.advantage_N,
            columns.behaviour_N,
            columns.base_N,
            columns.is_policy_gradient_N,
            train,
        )
        loss_N = loss_N / columns.denominator_N
        loss_N = torch.where(forward_pass.rows.target_masked_N, 0.0, loss_N)
        loss_N.sum().backward()  # type: ignore[no-untyped-call]
        said += [loss_N.detach(), logprob_N.detach() - columns.behaviour_N]
    done.said.append(
        _PassResult(
            shares=shares,
            masked_N=rows.target_masked_N.numpy(),
            download=kernels.device.download(*said),
            has_tokens=bool(sequences),
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenColumns:
    """What the loss of each target token depends on besides its log-probability."""

    advantage_N: Tensor
    behaviour_N: Tensor
    base_N: Tensor
    is_policy_gradient_N: Tensor
    denominator_N: Tensor


def _columns_of(shares: Sequence[Share]) -> _TokenColumns:
    groups = [group for share in shares for group in share.groups]
    columns = [
        torch.from_numpy(np.concatenate(column))
        for column in zip(*map(_token_columns, groups), strict=True)
    ]
    denominators_A = torch.tensor([share.lesson.denominator for share in shares])
    counts_A = torch.tensor([share.num_tokens for share in shares])
    return _TokenColumns(
        advantage_N=columns[0],
        behaviour_N=columns[1],
        base_N=columns[2],
        is_policy_gradient_N=columns[3],
        denominator_N=torch.repeat_interleave(denominators_A, counts_A),
    )


def _add_up(done: _Passes, said: _PassResult) -> NDArray[np.float64]:
    """Sums over each adapter's tokens into its tally; returns the sums over layers of the pass's
    routing."""
    arrays = said.download.arrays()
    routing = arrays[: len(arrays) - 2] if said.has_tokens else arrays
    route_counts = routing[0].sum(0).astype(np.float64) if routing else np.zeros(2)
    if not said.has_tokens:
        return route_counts
    loss_N, gap_N = arrays[-2:]
    counts_A = [share.num_tokens for share in said.shares]
    starts_A = np.cumsum([0, *counts_A[:-1]])
    is_compared_N = ~(np.isnan(gap_N) | said.masked_N)
    divergence_N = np.where(
        is_compared_N, _divergence(torch.from_numpy(gap_N).double()).numpy(), 0.0
    )
    columns = (
        np.add.reduceat(loss_N.astype(np.float64), starts_A),
        np.maximum.reduceat(np.where(is_compared_N, np.abs(gap_N), -np.inf), starts_A),
        np.add.reduceat(divergence_N, starts_A),
        np.add.reduceat(is_compared_N, starts_A, dtype=np.int64),
        np.add.reduceat(said.masked_N, starts_A, dtype=np.int64),
    )
    for share, loss, gap, kl, num_compared, num_masked in zip(said.shares, *columns, strict=True):
        tally = done.tallies.setdefault(share.lesson.key, _Tally())
        tally.loss += float(loss)
        tally.largest_gap = max(tally.largest_gap, float(gap))
        tally.kl += float(kl)
        tally.num_compared += int(num_compared)
        tally.num_masked += int(num_masked)
        tally.num_tokens += share.num_tokens
    return route_counts


def _divergence(gap_N: Tensor) -> Tensor:
    """KL(rollout || trainer) by sampled tokens: r - 1 - log r, never negative, with r = pi_trainer
    / pi_rollout (k3 in http://joschu.net/blog/kl-approx.html). `gap_N` is log r."""
    return torch.expm1(gap_N) - gap_N


Column = NDArray[np.float32] | NDArray[np.bool_]


def _token_columns(item: WeightedGroup) -> tuple[Column, Column, Column, Column]:
    """Columns of one group's tokens: advantage, behaviour log-probability, base log-probability,
    is-policy-gradient."""
    group, advantages = item.group, item.advantages
    counts = [len(scored.sample.completion_ids) for scored in group.samples]

    def known(values: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32]:
        pairs = zip(values, counts, strict=True)
        return np.concatenate(
            [np.full(n, np.nan, np.float32) if own is None else own for own, n in pairs]
        )

    return (
        np.repeat(np.asarray(advantages, np.float32), counts),
        known([scored.sample.logprobs for scored in group.samples]),
        known([scored.base_logprobs for scored in group.samples]),
        np.full(sum(counts), item.is_policy_gradient),
    )


def _take_over(slab: Slab, lesson: Lesson, norm: float | None) -> tuple[UpdateStatus, Dump | None]:
    """What became of one adapter, and its new bytes on their way to the host, if there are any.
    Takes over the new baseline where there is an update."""
    slot, baseline = slab.trained(lesson.key), lesson.baseline
    state = slot.state
    if norm is not None and not np.isfinite(norm):
        return UpdateStatus.NON_FINITE, None
    if norm is None and baseline.num_rewards == state.num_rewards:
        # A first logged reward moves no weight, but the baseline that it sets is learnt state too.
        return UpdateStatus.NO_SIGNAL, None
    state.baseline, state.num_rewards = baseline.value, baseline.num_rewards
    return UpdateStatus.UPDATED, slab.dump(slot)


def _update(
    slab: Slab,
    batch: AdapterBatch,
    status: UpdateStatus,
    dump: Dump | None,
    tally: _Tally | None,
    norm: float | None,
) -> ShardUpdate:
    key, slot = batch.adapter, slab.trained(batch.adapter)
    state = slot.state
    return ShardUpdate(
        adapter=key,
        status=status,
        state=(state.step, state.baseline, state.num_rewards),
        experts=() if dump is None else tuple(sorted(state.experts)),
        parts=None if dump is None else dump.parts(),
        metrics=_metrics(batch, tally, norm) if slab.shard.is_home(slot.address) else {},
    )


def _metrics(batch: AdapterBatch, tally: _Tally | None, norm: float | None) -> dict[str, float]:
    scored = [sample for group in batch.groups for sample in group.samples]
    rewards = [
        sample.reward
        for group in batch.groups
        if group.kind == ExperienceKind.TASK
        for sample in group.samples
    ]
    metrics = {"tokens": float(sum(len(sample.sample.completion_ids) for sample in scored))}
    if rewards:
        metrics["reward"] = float(np.mean(rewards))
    kls = [
        (sample.sample.logprobs - sample.base_logprobs).mean()
        for sample in scored
        if sample.base_logprobs is not None and sample.sample.logprobs is not None
    ]
    if kls:
        metrics["kl_to_base"] = float(np.mean(kls))
    if tally is not None and norm is not None:
        metrics |= {
            "loss": tally.loss,
            "grad_norm": norm,
            "logprob_gap_max": tally.largest_gap,
            "masked_share": tally.num_masked / tally.num_tokens,
            "targets": float(tally.num_tokens),
        }
        if tally.num_compared:
            metrics["rollout_kl"] = tally.kl / tally.num_compared
    return {name: value for name, value in metrics.items() if np.isfinite(value)}
