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
from populace.workers.adapters.slab import Slab
from populace.workers.base.attention import PackedAttention
from populace.workers.base.forward import ForwardPass, Kernels
from populace.workers.base.logprobs import token_logprobs
from populace.workers.base.model import BaseModel
from populace.workers.base.rows import PackedRows, pack_rows
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    ExperienceKind,
    ShardStep,
    ShardUpdate,
    UpdateStatus,
    WaveBatch,
)
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
    route_counts: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """Replayed selections, and those of them that the trainer would have made otherwise."""


def train_wave(
    base: BaseModel,
    slab: Slab,
    batch: WaveBatch,
    train: TrainSettings,
    optimizer: OptimizerSettings,
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
        own = [share for share in shares if slab.is_home(share.lesson.key)]
        _forward_backward(base, slab, own, train, done, accumulates=turn > 0)
    norms = update_adapters(slab, [lesson.key for lesson in taught], optimizer, base.exchange)
    updates = tuple(
        _update(
            slab,
            item,
            lessons[item.adapter],
            done.tallies.get(item.adapter),
            norms.get(item.adapter),
        )
        for item in batch.adapters
    )
    replayed, otherwise = base.exchange.all_reduce(done.route_counts).tolist()
    return ShardStep(
        updates=updates, num_rows=done.num_rows, out_of_route=(int(otherwise), int(replayed))
    )


def _forward_backward(
    base: BaseModel,
    slab: Slab,
    shares: Sequence[Share],
    train: TrainSettings,
    done: _Passes,
    *,
    accumulates: bool,
) -> None:
    """One pass with this shard's shares; leaves gradients in the slab and its sums in `done`."""
    kernels = Kernels.of(train)
    sequences = [sequence for share in shares for sequence in share.sequences]
    rows = pack_rows(sequences, base.routing_shape, kernels.row_multiple)
    forward_pass = ForwardPass.of(
        rows, PackedAttention(rows), slab, kernels, accumulates=accumulates
    )
    logprob_N = token_logprobs(base, base.hidden(forward_pass), forward_pass)
    if forward_pass.route_counts:
        done.route_counts += torch.stack(forward_pass.route_counts).sum(0)
    done.num_rows += rows.num_rows
    if not sequences:
        logprob_N.sum().backward()  # type: ignore[no-untyped-call]
        return

    # Every token's loss over its own adapter's denominator; masked tokens count nothing.
    groups = [group for share in shares for group in share.groups]
    advantage_N, behaviour_N, base_N, policy_N = (
        torch.from_numpy(np.concatenate(column))
        for column in zip(*map(_token_columns, groups), strict=True)
    )
    counts_A = [share.num_tokens for share in shares]
    denominators_A = torch.tensor([share.lesson.denominator for share in shares])
    loss_N = token_losses(logprob_N, advantage_N, behaviour_N, base_N, policy_N, train)
    loss_N = loss_N / torch.repeat_interleave(denominators_A, torch.tensor(counts_A))
    loss_N = torch.where(rows.target_masked_N, 0.0, loss_N)
    loss_N.sum().backward()  # type: ignore[no-untyped-call]
    _add_up(done, shares, rows, loss_N.detach(), logprob_N.detach() - behaviour_N)


def _add_up(
    done: _Passes, shares: Sequence[Share], rows: PackedRows, loss_N: Tensor, gap_N: Tensor
) -> None:
    """Sums over each adapter's tokens into its tally. `gap_N`: log-probability of the trainer minus
    that of the rollout, NaN where unknown."""
    counts_A = [share.num_tokens for share in shares]
    starts_A = np.cumsum([0, *counts_A[:-1]])
    is_compared_N = ~(gap_N.isnan() | rows.target_masked_N)
    divergence_N = torch.where(is_compared_N, _divergence(gap_N.double()), 0.0)
    columns = (
        np.add.reduceat(loss_N.double().numpy(), starts_A),
        np.maximum.reduceat(torch.where(is_compared_N, gap_N.abs(), -torch.inf).numpy(), starts_A),
        np.add.reduceat(divergence_N.numpy(), starts_A),
        np.add.reduceat(is_compared_N.numpy(), starts_A, dtype=np.int64),
        np.add.reduceat(rows.target_masked_N.numpy(), starts_A, dtype=np.int64),
    )
    for share, loss, gap, kl, num_compared, num_masked in zip(shares, *columns, strict=True):
        tally = done.tallies.setdefault(share.lesson.key, _Tally())
        tally.loss += float(loss)
        tally.largest_gap = max(tally.largest_gap, float(gap))
        tally.kl += float(kl)
        tally.num_compared += int(num_compared)
        tally.num_masked += int(num_masked)
        tally.num_tokens += share.num_tokens


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


def _update(
    slab: Slab, batch: AdapterBatch, lesson: Lesson, tally: _Tally | None, norm: float | None
) -> ShardUpdate:
    """What became of one adapter. Takes over the new baseline where there is an update."""
    key, state, baseline = batch.adapter, slab.slots[batch.adapter].state, lesson.baseline
    metrics = _metrics(batch, tally, norm) if slab.is_home(key) else {}
    status = UpdateStatus.UPDATED
    if norm is not None and not np.isfinite(norm):
        status = UpdateStatus.NON_FINITE
    elif norm is None and baseline.num_rewards == state.num_rewards:
        # A first logged reward moves no weight, but the baseline that it sets is learnt state too.
        status = UpdateStatus.NO_SIGNAL
    is_updated = status is UpdateStatus.UPDATED
    if is_updated:
        state.baseline, state.num_rewards = baseline.value, baseline.num_rewards
    return ShardUpdate(
        adapter=key,
        status=status,
        state=(state.step, state.baseline, state.num_rewards),
        experts=tuple(sorted(state.experts)) if is_updated else (),
        parts=slab.dump(key) if is_updated else None,
        metrics=metrics,
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
