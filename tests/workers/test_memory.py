"""The memory plan against what is measured, and what doesn't fit refused before it is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from populace.configs.load import load_settings
from populace.configs.schema import Settings, TrainSettings
from populace.population.sampler import limits_of
from populace.storage.errors import InvalidInput
from populace.workers.actors.engine import ShardEngine
from populace.workers.base.families import dims_of
from populace.workers.base.footprint import config_of, tensors_of
from populace.workers.base.forward import ForwardPass, Kernels
from populace.workers.base.model import BaseModel
from populace.workers.base.rows import SequenceGroup, pack_rows
from populace.workers.batch import AdapterKey, AdapterRef
from populace.workers.device import Device
from populace.workers.memory import WaveLimits, held_of, plan_memory, row_bytes, slot_bytes
from populace.workers.shapes import AdapterSpec
from populace.workers.shards.placement import NO_SLOT
from tests.support.loading import measure
from tests.support.pretend import Pretended

WIDE = dict(
    vocab_size=500, hidden_size=512, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=512, num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip


@pytest.mark.parametrize("num_shards", [1, 2])
def test_the_planned_base_is_within_a_tenth_of_what_a_cpu_holds(
    bases: dict[str, Path], tmp_path: Path, num_shards: int
) -> None:
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**WIDE)).save_pretrained(tmp_path)
    held = held_of(dims_of(tmp_path), tensors_of(config_of(str(tmp_path))), num_shards, 4)
    planned = held.dense_bytes + held.expert_bytes
    found = measure(tmp_path, 0, num_shards, bases["mixtral"])
    assert found["held"] == pytest.approx(planned, rel=0.01)
    assert found["grown"] == pytest.approx(planned, rel=0.10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_planned_activations_are_within_a_tenth_of_what_backward_keeps(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    common = dict(
        vocab_size=64, hidden_size=256, num_attention_heads=8, num_key_value_heads=2, head_dim=64
    )
    models = {
        "mixtral": lambda layers: MixtralForCausalLM(
            MixtralConfig(
                **common, num_hidden_layers=layers, intermediate_size=512, num_local_experts=4
            )
        ),
        "qwen3_moe": lambda layers: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common, num_hidden_layers=layers, moe_intermediate_size=96, num_experts=16,
                num_experts_per_tok=8,
            )
        ),
    }  # fmt: skip
    kept, device = [], Device(dtype)
    for layers in (2, 4):
        folder = tmp_path / str(layers)
        models[family](layers).save_pretrained(folder)
        kept.append(kept_by_backward(folder, device))
    measured = (kept[1] - kept[0]) / 2
    dims = dataclasses.replace(dims_of(folder), num_layers=1)
    assert row_bytes(dims, (0, 0), dtype.itemsize) == pytest.approx(measured, rel=0.10)


def kept_by_backward(folder: Path, device: Device) -> float:
    """Bytes per row that a pass keeps, without the base's weights."""
    base, random = BaseModel(folder, device), np.random.default_rng(0)
    groups = [
        SequenceGroup(
            address=NO_SLOT,
            prompt_ids=random.integers(0, 64, 16).astype(np.int32),
            branches=(random.integers(0, 64, 49).astype(np.int32),),
        )
        for _ in range(4)
    ]
    rows = pack_rows(groups, row_multiple=8)
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.hidden(ForwardPass.packed(rows, None, Kernels.of(TrainSettings(), device)))
    weights = [*base.decoder.parameters(), base.embeddings_VD]
    for layer in base.decoder.layers:
        weights += [layer.mlp.experts.gate_up_EOD, layer.mlp.experts.down_EDI, layer.mlp.gate.w_ED]
    own = {weight.untyped_storage()._cdata for weight in weights}
    kept = sum(storage.nbytes() for number, storage in found.items() if number not in own)
    return kept / rows.num_rows


@pytest.mark.parametrize("targets", ["both", "attention", "experts"])
def test_slots_take_on_a_device_what_is_planned(
    make_engine: Callable[..., ShardEngine], bases: dict[str, Path], targets: str
) -> None:
    spec = AdapterSpec(rank=3, expert_rank=1, alpha=8, learning_rate=1e-3, targets=targets)
    held = held_of(dims_of(bases["mixtral"]), tensors_of(config_of(str(bases["mixtral"]))), 1, 4)
    with Pretended().here():
        engine = make_engine(slots=2, device="cuda")
        engine.page_in([AdapterRef(key=AdapterKey("user", 0), spec=spec, seed=0)], True)
        assert engine.slab.memory.held_bytes == slot_bytes(  # type: ignore[union-attr]
            engine.base.dims, held, spec.ranks
        )


def test_a_base_that_does_not_fit_is_refused_before_it_is_loaded(
    make_engine: Callable[..., ShardEngine],
) -> None:
    device = Pretended()
    with (
        device.here() as report,
        mock.patch.object(torch.cuda, "mem_get_info", lambda *_: (10_000_000, 8 << 30)),
        pytest.raises(InvalidInput) as refused,
    ):
        make_engine(slots=64, device="cuda")
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("training needs 0.0") and "0.01 GB are free" in lines[0]
    assert lines[0].endswith("lower train.max_rows_per_pass")
    assert lines[1].split() == ["GB", "training", "rollout"]
    assert {line.split("  ")[0] for line in lines[2:]} == {
        "base", "weights of slots", "moments of slots", "context", "gradients", "activations",
        "workspace", "keys and values", "prompts", "together",
    }  # fmt: skip
    assert not report.num_operations, "nothing was read"


@pytest.mark.parametrize(
    ("limits", "free", "phase", "knob"),
    [
        (WaveLimits(slots=900, rows=1), 60e9, "rollout", "lower scheduler.slots"),
        (WaveLimits(slots=1, rows=100_000), 60e9, "training", "lower train.max_rows_per_pass"),
        (WaveLimits(slots=1, rows=1, sequences=5000), 60e9, "rollout", "rollout.samples_per_task"),
        (WaveLimits(slots=1, rows=1), 10e9, "rollout", "raise shard.count"),
    ],
)
def test_what_to_change_is_about_the_largest_part(
    limits: WaveLimits, free: float, phase: str, knob: str
) -> None:
    config = config_of("qwen3-30b-a3b")
    from populace.workers.base.families import dims_of_config

    dims = dims_of_config(config)
    held = held_of(dims, tensors_of(config), 8, 2)
    with pytest.raises(InvalidInput, match=f"(?s){phase} needs .* GB .*{knob}"):
        plan_memory(dims, held, limits, context_bytes=0.6e9).require(free, "the device")


def test_settings_bound_what_a_wave_asks_for() -> None:
    settings: Settings = load_settings(
        None,
        [
            "scheduler.max_adapters_per_wave=10",
            "scheduler.events_per_update=3",
            "rollout.samples_per_task=4",
            "adapter.targets=attention",
        ],
    )
    limits = limits_of(dataclasses.replace(settings, user_ranks={"somebody": 32}))
    assert limits.ranks == (32, 0) and limits.adapters == 10 and limits.sequences == 120
    assert limits.length == settings.train.max_sequence_length + settings.rollout.max_new_tokens
