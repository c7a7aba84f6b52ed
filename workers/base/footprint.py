"""The tensors of a base's checkpoint, by their names on disk, without a checkpoint: from a model on
the meta device."""

from __future__ import annotations

import json
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from populace.storage.errors import InvalidInput
from populace.workers.base.families import FAMILIES, RANDOM, check_checkpoint, dims_of_config

PRESETS = ("tiny", "olmoe-1b-7b", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "kimi-k2")
"""Public dimensions of well-known bases, in configs/bases/, and those of a tiny Qwen3-MoE."""


_RANDOM = re.compile(rf"{RANDOM}(?P<preset>[^:]+)(:(?P<layers>[0-9]{{1,4}}))?")


def config_of(base: str) -> Any:
    """The Hugging Face config of a preset, of `random:PRESET[:LAYERS]`, or of a checkpoint's
    folder."""
    if base.startswith(RANDOM):
        return _random_config(base)
    if base in PRESETS:
        body = json.loads((files("populace.configs") / "bases" / f"{base}.json").read_text())
        return AutoConfig.for_model(**body)
    if not Path(base).exists():
        raise InvalidInput(
            f"base is {base!r}; give a checkpoint's folder or one of {', '.join(PRESETS)}"
        )
    check_checkpoint(Path(base))
    return AutoConfig.from_pretrained(base, local_files_only=True)


def _random_config(name: str) -> Any:
    found = _RANDOM.fullmatch(name)
    if found is None or found["preset"] not in PRESETS:
        raise InvalidInput(
            f"base {name!r} is none; write {RANDOM}PRESET or {RANDOM}PRESET:LAYERS, where PRESET "
            f"is one of {', '.join(PRESETS)}"
        )
    config = config_of(found["preset"])
    least, most = dims_of_config(config).num_dense_layers + 1, config.num_hidden_layers
    layers = int(found["layers"] or most)
    if not least <= layers <= most:
        raise InvalidInput(
            f"base {name!r} has {layers} layers; {found['preset']} can have {least} to {most}"
        )
    config.num_hidden_layers = layers
    return config


def tensors_of(config: Any) -> dict[str, int]:
    """Name on disk -> number of elements, of everything that a base of this config reads."""
    family, dims = FAMILIES[config.model_type], dims_of_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {module: out * inp for module, out, inp in dims.shapes}
    found = {}
    for name, tensor in model.state_dict().items():
        if ".experts." not in name and not (
            name == "lm_head.weight" and config.tie_word_embeddings
        ):
            found[family.on_disk(name)] = math.prod(tensor.shape)
    for layer in range(dims.num_dense_layers, dims.num_layers):
        for expert in range(dims.num_experts):
            names = family.expert_on_disk(layer, expert)
            found |= dict(
                zip(names, (shapes[m] for m in ("gate_proj", "up_proj", "down_proj")), strict=True)
            )
    return found
