"""Every supported family computes what `transformers` computes; a shard holds its own part and no
more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from populace.storage.errors import InvalidInput
from populace.workers.actors.engine import ShardEngine
from populace.workers.base.checkpoint import SafetensorsFolder
from populace.workers.base.families import dims_of, dims_of_config
from populace.workers.base.footprint import PRESETS, config_of, tensors_of
from populace.workers.base.forward import ForwardPass
from populace.workers.base.model import BaseModel
from populace.workers.base.rows import SequenceGroup, pack_rows
from populace.workers.device import Device
from populace.workers.shards.placement import NO_SLOT, place_shards
from tests.support import tiny
from tests.support.loading import measure

Make = Callable[..., ShardEngine]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_logits_are_those_of_transformers(
    make_engine: Make, bases: dict[str, Path], family: str
) -> None:
    engine = make_engine(family)
    sequences = [
        np.random.default_rng(n).integers(2, tiny.VOCABULARY, n).astype(np.int32)
        for n in (3, 40, 17)
    ]
    rows = pack_rows(
        [SequenceGroup(address=NO_SLOT, prompt_ids=ids, branches=()) for ids in sequences],
        row_multiple=8,
    )
    forward_pass = ForwardPass.packed(rows, None, engine.kernels)
    ours = torch.split(
        engine.base.logits(engine.base.hidden(forward_pass)).detach(), list(rows.group_lengths)
    )
    model = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    for ids, mine in zip(sequences, ours, strict=False):
        with torch.no_grad():
            theirs = model(torch.from_numpy(ids).long()[None]).logits[0]
        assert float((mine - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_footprint_names_exactly_the_tensors_that_are_on_disk(
    bases: dict[str, Path], family: str
) -> None:
    expected: dict[str, int] = {}
    for path in bases[family].glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            expected |= {name: file.get_tensor(name).numel() for name in names}
    assert tensors_of(config_of(str(bases[family]))) == expected


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_tensor_is_placed_once_or_everywhere(
    bases: dict[str, Path], family: str, num_shards: int
) -> None:
    placement = place_shards(dims_of(bases[family]).num_experts, num_shards)
    for name in SafetensorsFolder(bases[family]).names:
        assert placement.shards_of(name) == tuple(range(num_shards)) or ".experts." in name
        assert ".experts." not in name or len(placement.shards_of(name)) == 1
    sizes = [len(shard.experts) for shard in placement.shards]
    assert max(sizes) - min(sizes) <= 1
    assert [expert for shard in placement.shards for expert in shard.experts] == list(
        range(sum(sizes))
    )


def test_more_shards_than_experts_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"shard.count is 5; this base has 4 experts"):
        place_shards(4, 5)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_have_as_many_parameters_as_their_bases(preset: str) -> None:
    billions = {
        "tiny": 0.0001898,
        "olmoe-1b-7b": 6.92,
        "mixtral-8x7b": 46.70,
        "qwen3-30b-a3b": 30.53,
        "deepseek-v3": 671.0,
        "kimi-k2": 1026.4,
    }[preset]
    assert sum(tensors_of(config_of(preset)).values()) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_trillion_parameters_are_placed_on_64_devices_of_80_gb() -> None:
    config = config_of("kimi-k2")
    placement = place_shards(dims_of_config(config).num_experts, 64)
    tensors = tensors_of(config)
    held = [0] * 64
    for name, size in tensors.items():
        for rank in placement.shards_of(name):
            held[rank] += 2 * size
    assert sum(held) >= 2 * sum(tensors.values()), "nothing is left out"
    replicated = 2 * sum(size for name, size in tensors.items() if ".experts." not in name)
    assert sum(held) == 2 * sum(tensors.values()) + 63 * replicated, (
        "only what is no expert's is there twice"
    )
    assert max(held) < 80e9


def test_a_shard_reads_and_holds_its_own_part_only(bases: dict[str, Path], tmp_path: Path) -> None:
    """200 MB of experts, so that the interpreter's own memory does not hide them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=500, hidden_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tensors = tensors_of(config_of(str(tmp_path)))
    placement = place_shards(8, 2)
    read = []
    for rank in range(2):
        found = measure(tmp_path, rank, 2, bases["mixtral"])
        share = 4 * sum(tensors[name] for name in placement.tensors_of(rank, tensors))
        assert found["read"] == share, "bytes read are the share's, to the byte"
        assert found["held"] >= 0.99 * share
        assert found["grown"] <= 1.10 * share, found
        read.append(found["read"])
    replicated = 4 * sum(size for name, size in tensors.items() if ".experts." not in name)
    assert sum(read) == 4 * sum(tensors.values()) + replicated


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "quantization_config",
            {"quant_method": "fp8"},
            r"is quantised \(quantization_config.quant_method is 'fp8'\)",
        ),
        ("sliding_window", 128, r"sliding_window is 128\), which isn't supported"),
        ("model_type", "gpt_oss", "is of family 'gpt_oss'; supported are"),
    ],
)
def test_a_checkpoint_that_would_be_computed_wrongly_is_refused(
    bases: dict[str, Path], tmp_path: Path, field: str, value: object, message: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["mixtral"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(InvalidInput, match=message):
        dims_of(folder)


def test_a_missing_or_unreadable_tensor_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["mixtral"], folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    whole = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match=f"has no tensor '{name}'"):
        BaseModel(folder, Device(torch.float32))
    save_file(
        {**tensors, name: whole.to(torch.float8_e4m3fn)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InvalidInput, match=r"is torch.float8_e4m3fn; convert the checkpoint"):
        BaseModel(folder, Device(torch.float32))


def test_a_tensor_of_another_shape_than_the_config_says_is_named(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["mixtral"], folder)
    config = json.loads((folder / "config.json").read_text())
    # One value would fill any memory that is there.
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 301}))
    with pytest.raises(InvalidInput, match=r"embed_tokens.* has the shape \(300, 32\), .*\(301, 3"):
        BaseModel(folder, Device(torch.float32))
