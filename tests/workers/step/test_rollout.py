"""Sampling: what the sampler says about a token is what the trainer computes for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from populace.workers.actors.engine import ShardEngine
from populace.workers.base.forward import ForwardPass
from populace.workers.base.logprobs import token_logprobs
from populace.workers.base.rows import SequenceGroup, pack_rows
from populace.workers.batch import (
    AdapterKey,
    RolloutGroup,
    RolloutRequest,
    StepResult,
    WaveBatch,
)
from populace.workers.shards.placement import SlotAddress
from tests.support import tiny
from tests.support.routing import NoisyGate, learn_from
from tests.workers.step.test_train import admit

Make = Callable[..., ShardEngine]


def request(key: AdapterKey, **fields: object) -> RolloutRequest:
    number = int(key.pseudonym.split("-")[1])
    defaults = {
        "adapter": key,
        "event_id": f"event-{number}",
        "prompt_ids": np.arange(10, 16 + number % 5, dtype=np.int32),
        "num_samples": 3,
        "max_new_tokens": 12,
        "temperature": 1.0,
    }
    return RolloutRequest(**{**defaults, **fields})


@torch.no_grad()
def trainer_logprobs(
    engine: ShardEngine, groups: list[RolloutGroup], replay: bool = True
) -> np.ndarray:
    """The trainer's view of rollouts, in the groups' order."""
    pieces = []
    for group in groups:
        slot = engine.slab.slots[group.adapter]
        rows = pack_rows(
            [
                SequenceGroup(
                    address=slot.address,
                    prompt_ids=group.prompt_ids,
                    branches=tuple(sample.completion_ids for sample in group.samples),
                    prompt_expert_ids=group.prompt_expert_ids if replay else None,
                    branch_expert_ids=tuple(
                        s.expert_ids if replay else None for s in group.samples
                    ),
                    temperature=group.temperature,
                )
            ],
            engine.base.routing_shape,
        )
        forward_pass = ForwardPass.packed(rows, engine.slab, engine.kernels)
        pieces.append(
            token_logprobs(engine.base, engine.base.hidden(forward_pass), forward_pass).numpy()
        )
    return np.concatenate(pieces)


def sampler_logprobs(groups: list[RolloutGroup]) -> np.ndarray:
    return np.concatenate([sample.logprobs for group in groups for sample in group.samples])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trainer_and_sampler_agree_in_fp32(
    make_engine: Make, family: str, temperature: float
) -> None:
    engine = make_engine(family)
    keys = admit(engine, [0, 1, 2, 3])
    groups = engine.roll_out([request(key, temperature=temperature) for key in keys])
    gap = np.abs(trainer_logprobs(engine, groups) - sampler_logprobs(groups))
    assert gap.max() <= 1e-3


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_trainer_and_sampler_agree_in_bf16_within_a_bound(
    make_engine: Make, family: str, record_property: Callable[[str, object], None]
) -> None:
    engine = make_engine(family, dtype="bfloat16")
    keys = admit(engine, [0, 1, 2, 3])
    groups = engine.roll_out([request(key, num_samples=8) for key in keys])
    gap = np.abs(trainer_logprobs(engine, groups) - sampler_logprobs(groups))
    record_property("mean", float(gap.mean()))
    record_property("max", float(gap.max()))
    print(f"bf16 {family}: mean {gap.mean():.4f}, maximum {gap.max():.3f} over {len(gap)} tokens")
    assert gap.mean() <= 0.02
    assert gap.max() <= 0.15


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_base_computes_what_transformers_computes(
    make_engine: Make, bases: dict[str, Path], family: str
) -> None:
    engine = make_engine(family)
    (key,) = admit(engine, [0])
    groups = engine.roll_out([request(key)])
    model = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    for scores, sample in zip(engine.score_base(groups)[0], groups[0].samples, strict=True):
        ids = torch.from_numpy(np.concatenate([groups[0].prompt_ids, sample.completion_ids])).long()
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        start = len(groups[0].prompt_ids) - 1
        expected = logprobs[start:-1].gather(1, ids[start + 1 :, None]).squeeze(1)
        np.testing.assert_allclose(scores, expected.numpy(), atol=1e-4)


def test_a_users_samples_do_not_depend_on_who_is_decoded_beside_them(make_engine: Make) -> None:
    engine = make_engine()
    keys = admit(engine, list(range(6)))
    together = engine.roll_out([request(key) for key in keys])
    for key, group in zip(keys, together, strict=True):
        (alone,) = engine.roll_out([request(key)])
        for one, other in zip(alone.samples, group.samples, strict=True):
            np.testing.assert_array_equal(one.completion_ids, other.completion_ids)


def test_samples_follow_the_policys_distribution(make_engine: Make) -> None:
    engine = make_engine()
    (key,) = admit(engine, [0])
    (group,) = engine.roll_out([request(key, num_samples=4000, max_new_tokens=1)])
    logprobs = {int(s.completion_ids[0]): float(s.logprobs[0]) for s in group.samples}
    counts = {token: 0 for token in logprobs}
    for sample in group.samples:
        counts[int(sample.completion_ids[0])] += 1
    for token, logprob in logprobs.items():
        prob = np.exp(logprob)
        assert abs(counts[token] / 4000 - prob) < 5 * np.sqrt(prob * (1 - prob) / 4000) + 1e-3
    assert sum(np.exp(list(logprobs.values()))) <= 1 + 1e-4


def test_temperature_zero_takes_the_likeliest_token(make_engine: Make) -> None:
    engine = make_engine()
    (key,) = admit(engine, [0])
    (group,) = engine.roll_out([request(key, temperature=0.0)])
    first, *rest = (sample.completion_ids for sample in group.samples)
    assert all(np.array_equal(first, other) for other in rest)


def test_replaying_the_recorded_experts_changes_nothing_and_other_experts_change_much(
    make_engine: Make,
) -> None:
    engine = make_engine()
    keys = admit(engine, [0, 1])
    groups = engine.roll_out([request(key) for key in keys])
    native = trainer_logprobs(engine, groups, replay=False)
    np.testing.assert_allclose(trainer_logprobs(engine, groups), native, atol=1e-4)
    import dataclasses

    num_experts = engine.base.dims.num_experts
    twisted = [
        dataclasses.replace(
            group,
            prompt_expert_ids=(group.prompt_expert_ids + 1) % num_experts,
            samples=tuple(
                dataclasses.replace(s, expert_ids=(s.expert_ids + 1) % num_experts)
                for s in group.samples
            ),
        )
        for group in groups
    ]
    assert np.abs(trainer_logprobs(engine, twisted) - native).mean() > 0.05


def test_positions_with_unknown_experts_route_natively_and_leave_the_loss(
    make_engine: Make,
) -> None:
    engine = make_engine()
    (key,) = admit(engine, [0])
    (group,) = engine.roll_out([request(key, num_samples=1)])
    (sample,) = group.samples
    ids = sample.expert_ids.copy()
    ids[2, 0] = -1
    rows = pack_rows(
        [
            SequenceGroup(
                address=SlotAddress(0, 0),
                prompt_ids=group.prompt_ids,
                branches=(sample.completion_ids,),
                prompt_expert_ids=group.prompt_expert_ids,
                branch_expert_ids=(ids,),
            )
        ],
        engine.base.routing_shape,
    )
    # Completion token 3 is predicted by the position of completion token 2.
    assert rows.target_masked_N.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_replay_keeps_the_trainer_with_the_rollout_when_the_router_is_noisy(
    make_engine: Make, family: str
) -> None:
    engine = make_engine(family)
    numbers = [0, 1, 2]
    keys = admit(engine, numbers)
    groups = engine.roll_out([request(key, num_samples=2) for key in keys])

    def train(noise: float, replay: bool) -> StepResult:
        for layer in engine.base.decoder.layers[engine.base.dims.num_dense_layers :]:
            gate = getattr(layer.mlp.gate, "gate", layer.mlp.gate)
            layer.mlp.gate = NoisyGate(gate, noise, 1) if noise else gate
        engine.reset()
        admit(engine, numbers)
        return engine.train_wave(
            WaveBatch(adapters=tuple(learn_from(group, replay) for group in groups))
        )

    def kl(result: StepResult) -> float:
        return float(np.mean([update.metrics["rollout_kl"] for update in result.updates]))

    quiet, replayed, native = train(0.0, True), train(0.5, True), train(0.5, False)
    assert quiet.out_of_route[0] == 0 < quiet.out_of_route[1]
    assert replayed.out_of_route[0] > 0.05 * replayed.out_of_route[1], (
        "the noise would have changed selections"
    )
    assert kl(replayed) <= 2 * kl(quiet) + 1e-9
    assert kl(native) > 1e-3 > 100 * kl(replayed)
    assert native.out_of_route == (0, 0), "nothing was recorded"


def test_tokens_whose_routing_cannot_be_mapped_are_counted(make_engine: Make) -> None:
    engine = make_engine("mixtral")
    (key,) = admit(engine, [0])
    (group,) = engine.roll_out([request(key, num_samples=2)])
    batch = learn_from(group, True)
    first = batch.groups[0].samples[0]
    ids = first.sample.expert_ids.copy()
    ids[1] = -1  # as from an engine with experts that this base doesn't have
    gap = dataclasses.replace(first, sample=dataclasses.replace(first.sample, expert_ids=ids))
    samples = (gap, *batch.groups[0].samples[1:])
    batch = dataclasses.replace(
        batch, groups=(dataclasses.replace(batch.groups[0], samples=samples),)
    )
    (update,) = engine.train_wave(WaveBatch(adapters=(batch,))).updates
    assert update.metrics["masked_share"] == pytest.approx(1 / update.metrics["tokens"])
