"""A revision as a PEFT adapter folder that `peft.PeftModel.from_pretrained` loads on the base
unchanged. Exact.

Expert LoRA goes through PEFT's `target_parameters`. There `gate_up_proj` is one stacked parameter
with one LoRA: separate gate and up of rank r become rank 2r with a block-diagonal B. PEFT stores
the experts of `lora_A` one after another and those of `lora_B` interleaved.

Suffixes: E experts, R rank, D in, F out.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from populace.population.client import Population
from populace.population.ledger.queries import revision_number
from populace.population.sampler import base_of
from populace.storage import paths
from populace.storage.errors import Forgotten, InvalidInput, ObjectNotFound
from populace.storage.log.loading import load_wave
from populace.workers.adapters.slab import unpack_weights
from populace.workers.base.families import dims_of
from populace.workers.layout import AdapterLayout, layout_of
from populace.workers.shapes import AdapterSpec


def export_peft(
    population: Population, user: str, folder: Path, revision: int | str = "serving"
) -> int:
    """Write `user`'s revision into `folder`; returns its number. `InvalidInput` if the folder has
    files."""
    population.ledger.follow()
    adapter = population.ledger.adapter(user)
    number = revision_number(population.ledger.catalog, adapter, revision)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"folder {str(folder)!r} is there already and not empty; name a new one")
    spec = AdapterSpec.from_dict(adapter.spec)
    base = base_of(population.meta, population.settings)
    layout = layout_of(dims_of(Path(base.folder)), *spec.ranks)
    flat = load_weights(population, layout, user, number)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(peft_tensors(layout, flat), folder / "adapter_model.safetensors", {"format": "pt"})
    config = peft_config(spec, base.folder, layout.dims.dense_modules)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return number


def load_weights(population: Population, layout: AdapterLayout, user: str, revision: int) -> Tensor:
    """A revision's weights [N] in exact layout. `InvalidInput` if it isn't kept."""

    def load() -> Tensor:
        ref = population.ledger.ref(population.ledger.adapter(user), revision)
        blobs = load_wave(
            population.store, population.ledger.keys, ref.requests(with_moments=False)
        )
        return unpack_weights(layout, ref.seed, blobs[0] if blobs else None, ref.experts)

    try:
        return load()
    except ObjectNotFound:  # its pack was just rewritten
        population.ledger.follow()
        return load()


def share_export(
    population: Population, user: str, number: int, folder: Path, valid_for: timedelta
) -> str:
    """Put an exported folder into the store, and return a link with which anybody can download
    it as a tar file until it expires. `InvalidInput` unless the store is an S3. `forget`
    removes it."""
    if not population.store.url.startswith("s3:"):
        raise InvalidInput(
            f"store is {population.store.url}; links need s3://, a folder can be copied as it is"
        )
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        archive.add(folder, arcname=f"revision-{number}")
    pseudonym = population.ledger.pseudonym(user)
    key = f"{paths.export_folder(population.meta.name, pseudonym)}/{number}.tar"
    population.store.put(key, body.getvalue())
    try:
        population.ledger.keys.fetch(pseudonym)
    except Forgotten:  # meanwhile
        population.store.delete(key)
        raise
    from populace.storage.objects.bucket import Bucket  # the minio SDK is slow to import

    return Bucket(population.store.url).presigned_link(key, valid_for)


def peft_config(
    spec: AdapterSpec, base_folder: str, dense_modules: Sequence[str]
) -> dict[str, object]:
    """`adapter_config.json`. The stacked gate_up has twice the rank and twice the alpha: the same
    scale."""
    gate_up, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    rank, expert_rank = spec.ranks
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_folder,
        "r": rank or expert_rank,
        "lora_alpha": spec.alpha,
        "target_modules": list(dense_modules) if rank else [],
        "target_parameters": [gate_up, down] if expert_rank else None,
        "rank_pattern": {gate_up: 2 * expert_rank, down: expert_rank} if expert_rank else {},
        "alpha_pattern": {gate_up: 2 * spec.alpha, down: spec.alpha} if expert_rank else {},
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def peft_tensors(layout: AdapterLayout, flat: Tensor) -> dict[str, Tensor]:
    """PEFT's names and shapes for an adapter in exact layout."""
    tensors = {}
    for layer in range(layout.dims.num_layers):
        prefix = f"base_model.model.model.layers.{layer}"
        for module in layout.dims.dense_modules if layout.rank else ():
            for which, name in (("a", "lora_A"), ("b", "lora_B")):
                tensors[f"{prefix}.self_attn.{module}.{name}.weight"] = layout.view(
                    flat, module, layer, which
                )
        if layer < layout.dims.num_dense_layers or not layout.expert_rank:
            continue
        parts = {
            (module, which): layout.view(flat, module, layer, which)
            for module in ("gate_proj", "up_proj", "down_proj")
            for which in "ab"
        }
        a_ERD = torch.cat([parts["gate_proj", "a"], parts["up_proj", "a"]], dim=1)
        b_EFR = torch.stack(
            [
                torch.block_diag(gate, up)  # type: ignore[no-untyped-call]
                for gate, up in zip(parts["gate_proj", "b"], parts["up_proj", "b"], strict=True)
            ]
        )
        # PEFT wraps the block twice; the inner wrapper is gate_up's.
        for where, a, b in (
            ("base_layer.", a_ERD, b_EFR),
            ("", parts["down_proj", "a"], parts["down_proj", "b"]),
        ):
            tensors[f"{prefix}.mlp.experts.{where}lora_A.weight"] = a.flatten(0, 1)
            tensors[f"{prefix}.mlp.experts.{where}lora_B.weight"] = b.permute(1, 2, 0).flatten(1)
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
