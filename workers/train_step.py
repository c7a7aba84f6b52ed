"""The fused step: one forward, backward and optimizer step for every adapter of a wave. Free of Ray.

What depends on one adapter alone stays so: its loss denominator, clipping, step counter, learning rates and
moments. A wave that is too large for memory runs in passes; a pass holds whole adapters, or the i-th share of an
adapter that is larger than a pass, so that how an adapter is split never depends on who else is there.

Suffixes: A adapters, N target tokens or elements of an adapter, T rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from populace.workers.attention import PackedAttention
from populace.workers.base import BaseModel, token_logprobs
from populace.workers.batch import AdapterBatch, AdapterKey, AdapterUpdate, StepResult, WaveBatch
from populace.workers.losses import Baseline, LossSettings, WeightedGroup, token_losses, weigh_groups
from populace.workers.rows import SequenceGroup, pack_rows
from populace.workers.slab import Slab, Slot
from populace.workers.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """See configs/schema.py, TrainSettings."""

    backend: str
    max_rows_per_pass: int
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    loss: LossSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """One adapter's part of one pass."""

    slot: Slot
    key: AdapterKey
    groups: tuple[WeightedGroup, ...]
    denominator: int
    """Loss tokens of the whole adapter, over all passes."""

    @property
    def num_rows(self) -> int:
        return sum(_sequence(item, self.slot).num_rows for item in self.groups)


def train_wave(base: BaseModel, slab: Slab, batch: WaveBatch, settings: TrainerSettings) -> StepResult:
    """Update every adapter of the batch in its slot and return the new bytes.

    An adapter without signal, or with a gradient that is not finite, keeps its weights and moments bit for bit
    and says so in its status; the others go on.
    """
    weighted: dict[AdapterKey, list[WeightedGroup]] = {}
    baselines: dict[AdapterKey, Baseline] = {}
    for item in batch.adapters:
        state = slab.slots[item.adapter].state
        before = Baseline(value=state.baseline, num_rewards=state.num_rewards)
        groups, baselines[item.adapter] = weigh_groups(item.groups, before, settings.loss)
        slot = slab.slots[item.adapter]
        slab.arenas[slot.arena].grads[slot.row].zero_()
        # Where every target is masked there is nothing to learn from, momentum or not.
        weighted[item.adapter] = [group for group in groups if _num_targets(base, group, slot)]

    active = [item for item in batch.adapters if weighted[item.adapter]]
    losses: dict[AdapterKey, float] = {item.adapter: 0.0 for item in active}
    mismatches: dict[AdapterKey, list[float]] = {item.adapter: [] for item in active}
    num_rows = 0
    for shares in _passes(base, slab, active, weighted, settings.max_rows_per_pass):
        num_rows += _forward_backward(base, slab, shares, settings, losses, mismatches)

    norms = {key: _grad_norm(slab, key) for key in losses}
    finite = [key for key in losses if np.isfinite(norms[key])]
    _adamw(slab, {key: norms[key] for key in finite}, settings)
    updates = []
    for item in batch.adapters:
        key = item.adapter
        metrics = _metrics(item, key, losses, norms, mismatches)
        state, baseline = slab.slots[key].state, baselines[key]
        if key in losses and key not in finite:
            updates.append(_unchanged(key, "non_finite", metrics))
        elif key not in losses and baseline.num_rewards == state.num_rewards:
            updates.append(_unchanged(key, "no_signal", metrics))
        else:
            # A first logged reward moves no weight, but the baseline that it sets is learnt state too.
            state.baseline, state.num_rewards = baseline.value, baseline.num_rewards
            experts = slab.reached_experts(key)
            state.experts = frozenset(experts)
            weights, moments = slab.dump(key, experts)
            updates.append(
                AdapterUpdate(
                    adapter=key,
                    status="updated",
                    weights=weights,
                    moments=moments,
                    experts=experts,
                    metrics=metrics,
                )
            )
    return StepResult(updates=tuple(updates), num_rows=num_rows)


def _passes(
    base: BaseModel,
    slab: Slab,
    active: Sequence[AdapterBatch],
    weighted: dict[AdapterKey, list[WeightedGroup]],
    max_rows: int,
) -> Iterator[list[_Share]]:
    """Shares of adapters by pass: the i-th shares of all adapters come before any (i+1)-th."""
    by_turn: dict[int, list[_Share]] = {}
    for item in active:
        slot, groups = slab.slots[item.adapter], weighted[item.adapter]
        denominator = sum(_num_targets(base, group, slot) for group in groups)
        for turn, part in enumerate(_split(groups, slot, max_rows)):
            share = _Share(slot=slot, key=item.adapter, groups=part, denominator=denominator)
            by_turn.setdefault(turn, []).append(share)
    for turn in sorted(by_turn):
        current: list[_Share] = []
        for share in sorted(by_turn[turn], key=lambda share: (share.slot.arena, share.slot.row)):
            if current and sum(other.num_rows for other in current) + share.num_rows > max_rows:
                yield current
                current = []
            current.append(share)
        yield current


def _split(groups: Sequence[WeightedGroup], slot: Slot, max_rows: int) -> list[tuple[WeightedGroup, ...]]:
    """An adapter's groups in shares of at most `max_rows` (a single larger group is a share of its own)."""
    parts: list[list[WeightedGroup]] = [[]]
    rows = 0
    for group in groups:
        size = _sequence(group, slot).num_rows
        if parts[-1] and rows + size > max_rows:
            parts.append([])
            rows = 0
        parts[-1].append(group)
        rows += size
    return [tuple(part) for part in parts]


def _sequence(item: WeightedGroup, slot: Slot) -> SequenceGroup:
    group = item.group
    return SequenceGroup(
        slot=(slot.arena, slot.row),
        prompt_ids=group.prompt_ids,
        branches=tuple(scored.sample.completion_ids for scored in group.samples),
        prompt_expert_ids=group.prompt_expert_ids,
        branch_expert_ids=tuple(scored.sample.expert_ids for scored in group.samples),
        temperature=group.temperature,
    )


def _num_targets(base: BaseModel, item: WeightedGroup, slot: Slot) -> int:
    rows = pack_rows([_sequence(item, slot)], base.routing_shape)
    return int((~rows.target_masked_N).sum())


def _forward_backward(
    base: BaseModel,
    slab: Slab,
    shares: Sequence[_Share],
    settings: TrainerSettings,
    losses: dict[AdapterKey, float],
    mismatches: dict[AdapterKey, list[float]],
) -> int:
    """One pass; adds gradients into the slab and returns the number of rows."""
    items = [(share, item) for share in shares for item in share.groups]
    rows = pack_rows([_sequence(item, share.slot) for share, item in items], base.routing_shape)
    step = Step.of(rows, PackedAttention(rows), slab, settings.backend)
    logprob_N = token_logprobs(base, base.hidden(step), step)

    columns = [
        _token_columns(item, advantage, index)
        for share, item in items
        for index, advantage in enumerate(item.advantages)
    ]
    advantage_N, behaviour_N, base_N, policy_N = (
        torch.cat([column[place] for column in columns]) for place in range(4)
    )
    # repeat_interleave over samples: which share each token belongs to.
    share_of_sample = [place for place, share in enumerate(shares) for item in share.groups for _ in item.advantages]
    share_N = torch.repeat_interleave(torch.tensor(share_of_sample), torch.tensor(rows.target_counts))
    denominator_N = torch.tensor([share.denominator for share in shares])[share_N]
    loss_N = token_losses(logprob_N, advantage_N, behaviour_N, base_N, policy_N.bool(), settings.loss)
    loss_N = torch.where(rows.target_masked_N, 0.0, loss_N / denominator_N)
    loss_N.sum().backward()  # type: ignore[no-untyped-call]

    gap_N = (logprob_N.detach() - behaviour_N).abs()
    for place, share in enumerate(shares):
        mine_N = share_N == place
        losses[share.key] += float(loss_N.detach()[mine_N].sum())
        mismatches[share.key] += gap_N[mine_N & ~gap_N.isnan() & ~rows.target_masked_N].tolist()
    return rows.num_rows


def _token_columns(item: WeightedGroup, advantage: float, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantage, behaviour log-probability, base log-probability, is-policy-gradient of one sample's tokens."""
    scored = item.group.samples[index]
    num_tokens = len(scored.sample.completion_ids)

    def known(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None) -> Tensor:
        return torch.full((num_tokens,), torch.nan) if values is None else torch.from_numpy(values.copy())

    return (
        torch.full((num_tokens,), advantage),
        known(scored.sample.logprobs),
        known(scored.base_logprobs),
        torch.full((num_tokens,), float(item.group.kind != "demonstration")),
    )


def _grad_norm(slab: Slab, key: AdapterKey) -> float:
    """Norm over the whole adapter: one sum of squares per part, added in layout order in fp64. Not finite when
    any element isn't."""
    slot = slab.slots[key]
    arena = slab.arenas[slot.arena]
    grad_N, dense = arena.grads[slot.row], arena.layout.dense_size
    parts = [grad_N[:dense], *grad_N[dense:].view(slab.dims.num_experts, -1)]
    return float(np.sqrt(sum(float(torch.linalg.vector_norm(part)) ** 2 for part in parts)))


def _adamw(slab: Slab, norms: dict[AdapterKey, float], settings: TrainerSettings) -> None:
    """AdamW (https://arxiv.org/abs/1711.05101) on each adapter's row in place, bias-corrected by its own step.

    Experts that no token ever reached are left out: they stay as initialised, weight decay included.
    """
    for key, norm in norms.items():
        slot = slab.slots[key]
        arena, spec = slab.arenas[slot.arena], slot.spec
        slot.state.step += 1
        arena.grads[slot.row].mul_(min(1.0, settings.max_grad_norm / (norm + 1e-12)))
        for which, rate in (
            ("a", spec.learning_rate),
            ("b", spec.learning_rate * spec.b_learning_rate_ratio),
        ):
            views = [
                _updated_parts(slab, key, flat[slot.row], which)
                for flat in (arena.weights, arena.grads, arena.m, arena.v)
            ]
            if not views[0]:
                continue
            torch._fused_adamw_(
                views[0],
                views[1],
                views[2],
                views[3],
                [],
                [torch.tensor(float(slot.state.step)) for _ in views[0]],
                lr=rate,
                beta1=settings.beta1,
                beta2=settings.beta2,
                weight_decay=settings.weight_decay,
                eps=settings.epsilon,
                amsgrad=False,
                maximize=False,
            )


def _updated_parts(slab: Slab, key: AdapterKey, flat_N: Tensor, which: str) -> list[Tensor]:
    """The tensors of `flat_N` that this step moves with the learning rate of A or of B. Where the two are one,
    `a` names whole parts and `b` nothing: few large pieces instead of hundreds of small ones."""
    slot = slab.slots[key]
    layout, experts = slab.arenas[slot.arena].layout, slab.reached_experts(key)
    parts = [flat_N[: layout.dense_size]] + [flat_N[slice(*layout.expert_range(expert))] for expert in experts]
    if slot.spec.b_learning_rate_ratio == 1.0:
        return parts if which == "a" else []
    return [
        part[place.offset : place.offset + place.shape[0] * place.shape[1]]
        for part, places in zip(parts, [layout.dense] + [layout.expert] * len(experts), strict=True)
        for place in places.values()
        if place.which == which
    ]


def _metrics(
    item: AdapterBatch,
    key: AdapterKey,
    losses: dict[AdapterKey, float],
    norms: dict[AdapterKey, float],
    mismatches: dict[AdapterKey, list[float]],
) -> dict[str, float]:
    scored = [sample for group in item.groups for sample in group.samples]
    rewards = [sample.reward for group in item.groups if group.kind == "task" for sample in group.samples]
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
    if key in losses:
        metrics |= {"loss": losses[key], "grad_norm": norms[key]}
        if mismatches[key]:
            metrics["logprob_gap_max"] = max(mismatches[key])
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def _unchanged(key: AdapterKey, status: str, metrics: dict[str, float]) -> AdapterUpdate:
    return AdapterUpdate(adapter=key, status=status, weights=b"", moments=b"", experts=(), metrics=metrics)
