"""Bases whose weights are drawn from a seed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from populace.configs.schema import BaseSettings, Settings
from populace.population.client import Population
from populace.population.experience.events import Demonstration
from populace.population.waves.chat import Chat
from populace.storage.errors import Damaged, InvalidInput
from populace.storage.objects.cloud import MemoryStore
from populace.workers.base.families import dims_of
from populace.workers.base.footprint import config_of
from populace.workers.base.model import BaseModel
from populace.workers.base.registry import (
    PreparedBase,
    cache_folder,
    find_base,
    find_prepared,
    prepare_base,
)
from populace.workers.device import Cuda, Device
from tests.support.pretend import Pretended


def prepared(name: str) -> PreparedBase:
    return prepare_base(name, lambda stage: None)


def values_of(base: BaseModel) -> dict[str, torch.Tensor]:
    experts = {
        f"{layer}.{name}": getattr(block.mlp.experts, name)
        for layer, block in enumerate(base.decoder.layers)
        for name in ("gate_up_EOD", "down_EDI")
    }
    return {**dict(base.decoder.named_parameters()), **experts, "head": base.head_VD}


def test_a_preset_is_a_base_of_its_dimensions_and_of_as_many_layers_as_asked() -> None:
    whole, cut = prepared("random:qwen3-30b-a3b"), prepared("random:qwen3-30b-a3b:5")
    assert (dims_of(Path(whole.folder)).num_layers, dims_of(Path(cut.folder)).num_layers) == (48, 5)
    assert dims_of(Path(cut.folder)).shapes == dims_of(Path(whole.folder)).shapes
    assert whole.digest != cut.digest
    assert find_prepared(cut.name) == find_base(cut.name) == prepared(cut.name) == cut
    assert config_of(cut.folder).vocab_size == 151_936
    assert sum(path.stat().st_size for path in Path(cut.folder).iterdir()) < 100_000
    # Leading layers without experts stay.
    assert dims_of(Path(prepared("random:deepseek-v3:4").folder)).num_dense_layers == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:gpt-5", r"base 'random:gpt-5' is none; write random:PRESET .* qwen3-30b-a3b"),
        ("random:tiny:x", r"base 'random:tiny:x' is none"),
        ("random:tiny:0", r"has 0 layers; tiny can have 1 to 2"),
        ("random:tiny:3", r"has 3 layers; tiny can have 1 to 2"),
        ("random:tiny:٢", r"base 'random:tiny:٢' is none"),
        ("random:tiny:99999999999999999999", r"is none; write"),
        ("random:../x", r"base 'random:../x' is none"),
        ("random:deepseek-v3:3", r"has 3 layers; deepseek-v3 can have 4 to 61"),
    ],
)
def test_what_is_no_preset_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        prepared(name)
    assert find_prepared(name) is None
    with pytest.raises(InvalidInput, match=f"run `populace base prepare {name}`"):
        find_base(name)


def test_weights_follow_from_seed_and_name_whatever_a_shard_holds() -> None:
    folder = Path(prepared("random:tiny").folder)
    whole, again = (values_of(BaseModel(folder, Device(torch.float32))) for _ in range(2))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    part = values_of(BaseModel(folder, Device(torch.float32), 1, 2))
    assert torch.equal(part["1.down_EDI"], whole["1.down_EDI"][4:])
    assert torch.equal(part["0.gate_up_EOD"], whole["0.gate_up_EOD"][4:])
    # No two alike, of one scale; norms leave what they get.
    first, second = whole["0.down_EDI"][:2]
    assert not torch.equal(first, second)
    assert float(whole["head"].std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(whole["norm.weight"], torch.ones(64))


def test_weights_are_drawn_where_the_shard_computes() -> None:
    folder = Path(prepared("random:tiny").folder)
    with Pretended().here() as report:
        base = BaseModel(folder, Cuda(torch.float32))
        assert all(tensor.is_cuda for tensor in values_of(base).values())
    assert not report.mixes and not report.hazards


def test_text_becomes_tokens_of_the_vocabulary_and_comes_back() -> None:
    chat = Chat(prepared("random:tiny").folder)
    ids = chat.completion_ids("Grüße, 雨!")
    assert ids.max() < 512 and chat.text(ids) == "Grüße, 雨!"
    assert chat.prompt_ids("What is rain?").max() < 512 and set(ids[-1:]) == set(chat.eos_ids)


def test_a_population_that_is_to_be_kept_gets_none(tmp_path: Path) -> None:
    prepared("random:tiny")
    plain = Settings(name="pop", base=BaseSettings(model="random:tiny"))
    url = f"file://{tmp_path}/store"
    with pytest.raises(InvalidInput, match=r"base.model is 'random:tiny', .* base.scratch=true"):
        Population.create(url, plain)
    assert not (tmp_path / "store" / "pop").exists(), "nothing was written"
    Population.create(MemoryStore(), plain)
    scratch = Settings(name="pop", base=BaseSettings(model="random:tiny", scratch=True))
    population = Population.create(url, scratch)
    population.enqueue("ada", [Demonstration(prompt="What is rain?", completion="Water.")])
    assert isinstance(population.sample("ada", "What is rain?"), str)


def test_several_may_prepare_it_at_once(tmp_path: Path) -> None:
    script = (
        "from populace.workers.base.registry import _prepare_seeded\n"
        "for _ in range(15):\n"
        "    print(_prepare_seeded('random:tiny', str).digest)\n"
    )
    environment = {**os.environ, "POPULACE_CACHE": str(tmp_path / "cache")}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    outputs = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0], outputs
    assert len({line for out, _ in outputs for line in out.split()}) == 1
    assert not list((tmp_path / "cache" / "bases").glob(".*")), "no copy is left behind"


@pytest.mark.parametrize("damage", ["junk", "file", "no tokenizer"])
def test_what_is_damaged_in_the_cache_is_made_anew(damage: str) -> None:
    name = {"junk": "random:tiny:1", "file": "random:olmoe-1b-7b:2"}.get(damage, "random:kimi-k2:2")
    base = prepared(name)
    folder, entry = Path(base.folder), cache_folder() / "bases" / f"{name}.json"
    if damage == "file":
        shutil.rmtree(folder)
        folder.write_text("in the way")
    elif damage == "junk":
        (folder / "random.json").write_text("junk")
    else:
        (folder / "tokenizer.json").unlink()
    entry.unlink()
    assert prepared(name) == base == find_base(name)
    assert Chat(base.folder).num_tokens == 258


@pytest.mark.parametrize("content", ["junk", "", '{"name": 1}'])
def test_a_damaged_entry_of_the_registry_is_named(content: str) -> None:
    prepared("random:tiny")
    entry = cache_folder() / "bases" / "random:tiny.json"
    before = entry.read_text()
    try:
        entry.write_text(content)
        with pytest.raises(Damaged, match=r"random:tiny.json is not what was registered; delete"):
            find_prepared("random:tiny")
    finally:
        entry.write_text(before)
