"""LoRA on attention, on experts, or on both: a whole life of each, from the first wave to PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.tools.diff import diff_revisions
from populace.population.tools.peft import export_peft
from populace.population.tools.replay import replay
from populace.storage.objects.cloud import MemoryStore
from populace.workers.batch import AdapterKey
from populace.workers.layout import layout_of
from populace.workers.shapes import EXPERT_MODULES, AdapterSpec
from tests.population.tools.test_peft import logits_of, peft_logits
from tests.support.loops import Loop
from tests.support.streams import experience


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("targets", ["attention", "experts", "both"])
def test_an_adapter_learns_is_kept_replayed_compared_and_exported(
    settings: Settings,
    start: Callable[..., Loop],
    bases: dict[str, Path],
    tmp_path: Path,
    targets: str,
    family: str,
) -> None:
    settings = dataclasses.replace(
        settings,
        base=dataclasses.replace(settings.base, model=str(bases[family])),
        adapter=dataclasses.replace(settings.adapter, targets=targets),
    )
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=2))
    controller = start(population)
    while controller.wave() is not None:
        pass
    adapter = population.ledger.adapter("user-0")
    spec = AdapterSpec.from_dict(adapter.spec)
    assert spec.targets == targets and adapter.tip > 1
    state = population.ledger.catalog.revision_of(adapter.pseudonym, adapter.tip)
    assert bool(state.experts) == (targets != "attention")
    dims = controller.workers.base.dims  # type: ignore[attr-defined]
    layout = layout_of(dims, *spec.ranks)
    whole = layout_of(dims, spec.rank, spec.expert_rank)
    assert (layout.dense_size, layout.expert_size) == (
        0 if targets == "experts" else whole.dense_size,
        0 if targets == "attention" else whole.expert_size,
    )

    # The same bytes again, from the evidence.
    assert all(step.is_same for step in replay(population, "user-0"))

    norms = {item.module: item for item in diff_revisions(population, "user-0", 0, adapter.tip)}
    trained = {module for module, item in norms.items() if item.change > 0}
    experts = set(EXPERT_MODULES)
    attention = set(dims.dense_modules)
    expected = {"attention": attention, "experts": experts, "both": attention | experts}
    assert set(norms) == trained == expected[targets]

    # PEFT computes the same logits.
    export_peft(population, "user-0", tmp_path / "peft", "tip")
    key = AdapterKey(adapter.pseudonym, adapter.tip)
    controller.workers.page_in([population.ledger.ref(adapter, adapter.tip)], False)
    ids = np.arange(5, 60, dtype=np.int32)
    ours = logits_of(controller, key, ids)
    base, theirs = peft_logits(bases[family], tmp_path / "peft", ids)
    largest = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= 1e-5 * largest
    assert float((base - theirs).abs().max()) > 1e-4 * largest, "the adapter does something"
    population.ownership.release()


def test_a_spec_from_before_there_was_a_choice_means_both() -> None:
    old = {"rank": 8, "expert_rank": 1, "alpha": 32.0, "learning_rate": 1e-3}
    spec = AdapterSpec.from_dict({**old, "b_learning_rate_ratio": 1.0})
    assert spec.targets == "both" and spec.ranks == (8, 1)


def test_users_of_different_targets_share_a_wave(
    settings: Settings, start: Callable[..., Loop]
) -> None:
    """A population whose setting changes keeps what its adapters were created with."""
    store = MemoryStore()
    population = Population.create(store, settings)
    population.enqueue_many(experience(settings, num_users=1, num_tasks=3))
    start(population).wave()
    population.ownership.release()
    later = dataclasses.replace(
        settings, adapter=dataclasses.replace(settings.adapter, targets="attention")
    )
    again = Population.open(store, later)
    again.enqueue_many(experience(later, num_users=2, num_tasks=5))
    controller = start(again)
    while controller.wave() is not None:
        pass
    found = {user: again.ledger.adapter(user) for user in ("user-0", "user-1")}
    assert found["user-0"].spec["targets"] == "both" and found["user-0"].tip > 1
    assert found["user-1"].spec["targets"] == "attention" and found["user-1"].tip >= 1
    for user in found:
        assert all(step.is_same for step in replay(again, user))
    again.ownership.release()
