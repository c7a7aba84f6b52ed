"""What two engines must say alike: adapters of every kind, two steps with rollouts, scores and
lessons, and how close the results have to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from populace.workers.actors.engine import ShardEngine
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    AdapterRef,
    ExperienceKind,
    RolloutGroup,
    RolloutRequest,
    Sample,
    ScoredSample,
    StepResult,
    TrainGroup,
    WaveBatch,
)
from populace.workers.layout import AdapterLayout
from populace.workers.shapes import AdapterSpec

SPECS = (
    AdapterSpec(rank=1, expert_rank=1, alpha=32, learning_rate=1e-3),
    AdapterSpec(rank=5, expert_rank=2, alpha=32, learning_rate=2e-3, b_learning_rate_ratio=4.0),
    AdapterSpec(rank=20, expert_rank=3, alpha=16, learning_rate=1e-3, targets="attention"),
    AdapterSpec(rank=4, expert_rank=3, alpha=16, learning_rate=1e-3, targets="experts"),
)


def admit(engine: ShardEngine) -> list[AdapterKey]:
    """Adapters of every kind, with a non-zero B."""
    keys = [AdapterKey(f"user-{number}", 0) for number in range(len(SPECS))]
    refs = [
        AdapterRef(key=k, spec=s, seed=n) for n, (k, s) in enumerate(zip(keys, SPECS, strict=True))
    ]
    engine.page_in(refs, True)
    for number, (key, spec) in enumerate(zip(keys, SPECS, strict=True)):
        size = engine.slab.exact_layout(spec).size
        values = np.random.default_rng(number).normal(0, 0.05, size).astype(np.float32)
        experts = range(engine.base.dims.num_experts) if spec.ranks[1] else ()
        engine.slab.load(key, values.tobytes(), None, tuple(experts))
    return keys


def requests(keys: list[AdapterKey]) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            adapter=key,
            event_id="task",
            prompt_ids=np.arange(2, 5 + number, dtype=np.int32),
            num_samples=2,
            max_new_tokens=2 + number % 2,
            temperature=(0.8, 0.0)[number % 2],
        )
        for number, key in enumerate(keys)
    ]


def shown(length: int) -> TrainGroup:
    """A demonstration of so many tokens."""
    sample = Sample(
        completion_ids=np.arange(7, 7 + length, dtype=np.int32),
        logprobs=None,
        expert_ids=None,
        finished=True,
    )
    return TrainGroup(
        event_id="shown",
        kind=ExperienceKind.DEMONSTRATION,
        prompt_ids=np.arange(3, 6, dtype=np.int32),
        prompt_expert_ids=None,
        samples=(ScoredSample(sample=sample, reward=1.0, base_logprobs=None),),
    )


def lessons(groups: list[RolloutGroup], scores: list[tuple[np.ndarray, ...]]) -> WaveBatch:
    """The rollouts as tasks, with their routing, and a demonstration for each user."""
    batches = []
    for number, (group, own) in enumerate(zip(groups, scores, strict=True)):
        task = TrainGroup(
            event_id="task",
            kind=ExperienceKind.TASK,
            prompt_ids=group.prompt_ids,
            prompt_expert_ids=group.prompt_expert_ids,
            samples=tuple(
                ScoredSample(sample=sample, reward=float(place), base_logprobs=score)
                for place, (sample, score) in enumerate(zip(group.samples, own, strict=True))
            ),
            temperature=group.temperature,
        )
        demonstration = shown(4 + number)
        batches.append(AdapterBatch(adapter=group.adapter, groups=(task, demonstration)))
    return WaveBatch(adapters=tuple(batches))


@dataclasses.dataclass
class Told:
    """What two steps said."""

    groups: list[list[RolloutGroup]]
    scores: list[list[tuple[np.ndarray, ...]]]
    steps: list[StepResult]


def two_steps(engine: ShardEngine) -> Iterator[Told]:
    """Roll out, score, train, twice; yields after every call, and what there is so far."""
    told, keys = Told([], [], []), admit(engine)
    yield told
    for turn in range(2):
        told.groups.append(engine.roll_out(requests(keys)))
        yield told
        told.scores.append(engine.score_base(told.groups[-1]))
        yield told
        told.steps.append(engine.train_wave(lessons(told.groups[-1], told.scores[-1])))
        yield told
        pairs = [(key, AdapterKey(key.pseudonym, turn + 1)) for key in keys]
        engine.committed(pairs)
        keys = [new for _, new in pairs]


def assert_same(engine: ShardEngine, there: Told, here: Told) -> None:
    """fp32 log-probabilities within 1e-4, the same tokens and experts, and weights and moments
    within 1e-5 of their norm, tensor by tensor."""
    for one, other in zip(there.groups, here.groups, strict=True):
        for group, twin in zip(one, other, strict=True):
            assert np.array_equal(group.prompt_expert_ids, twin.prompt_expert_ids)
            for sample, same in zip(group.samples, twin.samples, strict=True):
                assert np.array_equal(sample.completion_ids, same.completion_ids)
                assert np.array_equal(sample.expert_ids, same.expert_ids)
                np.testing.assert_allclose(sample.logprobs, same.logprobs, rtol=0, atol=1e-4)
    for one, other in zip(there.scores, here.scores, strict=True):
        for scores, twins in zip(one, other, strict=True):
            for score, twin in zip(scores, twins, strict=True):
                np.testing.assert_allclose(score, twin, rtol=0, atol=1e-4)
    for step, twin_step in zip(there.steps, here.steps, strict=True):
        assert step.out_of_route == twin_step.out_of_route
        for update, twin_update, spec in zip(step.updates, twin_step.updates, SPECS, strict=True):
            assert update.status == twin_update.status == "updated"
            assert update.experts == twin_update.experts
            layout = engine.slab.exact_layout(spec)
            for got, want in (
                (update.weights, twin_update.weights),
                (update.moments[24:], twin_update.moments[24:]),
            ):
                assert_close(layout, got, want)
            assert update.metrics == pytest.approx(twin_update.metrics, rel=1e-4, abs=1e-5)


def assert_close(layout: AdapterLayout, got: bytes, want: bytes) -> None:
    """Within 1e-5 of the whole adapter's norm, and within 1e-4 of every tensor's: Adam gives an
    element whose gradient is about epsilon a full step either way."""
    flats, twins = (
        torch.frombuffer(bytearray(own), dtype=torch.float32).view(-1, layout.size)
        for own in (got, want)
    )
    for flat_P, twin_P in zip(flats, twins, strict=True):
        assert torch.linalg.vector_norm(flat_P - twin_P) <= 1e-5 * torch.linalg.vector_norm(twin_P)
        for where in (*layout.dense, *layout.expert):
            tensor, twin = layout.view(flat_P, *where), layout.view(twin_P, *where)
            gap, size = (float(torch.linalg.vector_norm(x)) for x in (tensor - twin, twin))
            assert gap <= 1e-4 * size, (where, gap, size)


def wave_of(keys: list[AdapterKey]) -> WaveBatch:
    """A demonstration for each user, made up."""
    group = shown(5)
    return WaveBatch(adapters=tuple(AdapterBatch(adapter=k, groups=(group,)) for k in keys))
