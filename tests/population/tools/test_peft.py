"""An exported revision is, for peft, the very same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from populace.configs.schema import BaseSettings, Settings
from populace.population.client import Population
from populace.population.controller import Controller
from populace.population.tools.peft import export_peft, peft_config, peft_tensors
from populace.storage.errors import InvalidInput
from populace.storage.objects.cloud import MemoryStore
from populace.workers.adapters.slab import Slab
from populace.workers.base.forward import ForwardPass
from populace.workers.base.rows import SequenceGroup, pack_rows
from populace.workers.batch import AdapterKey
from tests.support import tiny
from tests.support.streams import experience


@torch.no_grad()
def logits_of(controller: Controller, key: AdapterKey, ids: np.ndarray) -> torch.Tensor:
    engine = controller.workers
    slot = engine.slab.slots[key]  # type: ignore[attr-defined]
    rows = pack_rows([SequenceGroup(address=slot.address, prompt_ids=ids, branches=())])
    forward = ForwardPass.packed(rows, engine.slab, engine.kernels)  # type: ignore[attr-defined]
    return engine.base.logits(engine.base.hidden(forward))  # type: ignore[attr-defined]


@torch.no_grad()
def peft_logits(base: Path, adapter: Path, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Of transformers' base alone, and with the exported adapter as PEFT loads it: [T, V] each."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    given = torch.from_numpy(ids).long()[None]
    alone = model(given).logits[0]
    return alone, peft.PeftModel.from_pretrained(model, adapter)(given).logits[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_peft_computes_the_same_logits(
    settings: Settings,
    start: Callable[..., Controller],
    bases: dict[str, Path],
    tmp_path: Path,
    family: str,
) -> None:
    settings = dataclasses.replace(
        settings, base=BaseSettings(model=str(bases[family]), dtype="float32")
    )
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=2))
    controller = start(population)
    while controller.wave() is not None:
        pass
    adapter = population.ledger.adapter("user-0")
    assert (
        adapter.tip > 1
        and population.ledger.catalog.revision_of(adapter.pseudonym, adapter.tip).experts
    )
    export_peft(population, "user-0", tmp_path / "peft", "tip")
    key = AdapterKey(adapter.pseudonym, adapter.tip)
    controller.workers.page_in([population.ledger.ref(adapter, adapter.tip)], False)
    ids = np.arange(5, 60, dtype=np.int32)
    ours = logits_of(controller, key, ids)
    base, theirs = peft_logits(bases[family], tmp_path / "peft", ids)
    largest = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= 1e-5 * largest
    assert float((base - theirs).abs().max()) > 1e-3 * largest, "the adapter does something"
    population.ownership.release()


def test_expert_deltas_are_exported_to_their_own_experts(
    settings: Settings, start: Callable[..., Controller], bases: dict[str, Path], tmp_path: Path
) -> None:
    """A large random adapter on every module: a swapped expert or a swapped gate and up can't
    hide."""
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=1, num_tasks=3))
    controller = start(population)
    controller.wave()
    adapter = population.ledger.adapter("user-0")
    slab: Slab = controller.workers.slab  # type: ignore[attr-defined]
    (key,) = [key for key in slab.slots if key.pseudonym == adapter.pseudonym]
    slot = slab.slots[key]
    layout = slab.exact_layout(slot.spec)
    values = np.random.default_rng(1).normal(0, 0.2, layout.size).astype(np.float32)
    slab.load(key, values.tobytes(), None, tuple(range(4)))
    import json

    from safetensors.torch import save_file

    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(peft_tensors(layout, torch.from_numpy(values)), folder / "adapter_model.safetensors")
    config = peft_config(slot.spec, str(bases["mixtral"]), layout.dims.dense_modules)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ids = np.arange(5, 60, dtype=np.int32)
    ours = logits_of(controller, key, ids)
    _, theirs = peft_logits(bases["mixtral"], folder, ids)
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    population.ownership.release()


def test_a_folder_with_files_is_refused(
    settings: Settings, start: Callable[..., Controller], tmp_path: Path
) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=1, num_tasks=3))
    start(population).wave()
    (tmp_path / "something").write_text("mine")
    with pytest.raises(InvalidInput, match="not empty"):
        export_peft(population, "user-0", tmp_path)
    population.ownership.release()
