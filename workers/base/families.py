"""The families of bases: what a Hugging Face config says about their shapes, and what their tensors
are called on disk.

A family is supported once it stands in `FAMILIES`; docs/families.md says what was tested. Torch and
transformers are loaded by the functions that need them: looking a base up needs neither.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from populace.storage.errors import InvalidInput
from populace.workers.shapes import BaseDims

if TYPE_CHECKING:
    from torch import nn

    from populace.workers.base.gates import Gate

Shapes = tuple[tuple[str, int, int], ...]

RANDOM, RANDOM_FILE = "random:", "random.json"
"""How the name of a base begins whose weights are drawn from a seed, and the file that says so in
its folder; see `seeded.py`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What sets a family apart from the others."""

    num_experts: str
    """Config field, as are the next two."""
    intermediate: str
    """An expert's inner width."""
    dense_layers: str | None = None
    """How many leading layers have no experts."""
    attention: Callable[[Any], Shapes]
    """(module, F, D) of the projections that carry LoRA."""
    gate: Callable[[Any, nn.Module], Gate]
    block_on_disk: str = "mlp"
    experts_on_disk: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def on_disk(self, parameter: str) -> str:
        """The checkpoint's name of a parameter of the model that is no expert's."""
        return parameter.replace(".mlp.", f".{self.block_on_disk}.")

    def expert_on_disk(self, layer: int, expert: int) -> list[str]:
        """Names of an expert's gate, up and down."""
        stem = f"model.layers.{layer}.{self.block_on_disk}.experts.{expert}"
        return [f"{stem}.{name}.weight" for name in self.experts_on_disk]


def _heads(config: Any) -> Shapes:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key_value = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    hidden = config.hidden_size
    return (
        ("q_proj", query, hidden),
        ("k_proj", key_value, hidden),
        ("v_proj", key_value, hidden),
        ("o_proj", hidden, query),
    )


def _latent_heads(config: Any) -> Shapes:
    """Multi-head latent attention (https://arxiv.org/abs/2405.04434, section 2.1)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    queries: Shapes = (("q_proj", query, hidden),)
    if config.q_lora_rank is not None:
        queries = (
            ("q_a_proj", config.q_lora_rank, hidden),
            ("q_b_proj", query, config.q_lora_rank),
        )
    return (
        *queries,
        ("kv_a_proj_with_mqa", config.kv_lora_rank + config.qk_rope_head_dim, hidden),
        ("kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        ("o_proj", hidden, heads * config.v_head_dim),
    )


def _softmax_gate(normalise: str | None) -> Callable[[Any, nn.Module], Gate]:
    """`normalise`: the config field that says so; None: always."""

    def gate(config: Any, module: nn.Module) -> Gate:
        from populace.workers.base.gates import SoftmaxGate

        return SoftmaxGate(
            w_ED=module.weight,  # type: ignore[arg-type]
            top_k=config.num_experts_per_tok,
            normalise=normalise is None or bool(getattr(config, normalise)),
        )

    return gate


def _group_limited_gate(config: Any, module: nn.Module) -> Gate:
    from populace.workers.base.gates import GroupLimitedGate

    return GroupLimitedGate(
        w_ED=module.weight,  # type: ignore[arg-type]
        bias_E=module.e_score_correction_bias,  # type: ignore[arg-type]
        top_k=config.num_experts_per_tok,
        num_groups=config.n_group,
        top_groups=config.topk_group,
        normalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )


FAMILIES = {
    "mixtral": Family(
        num_experts="num_local_experts",
        intermediate="intermediate_size",
        attention=_heads,
        gate=_softmax_gate(None),
        block_on_disk="block_sparse_moe",
        experts_on_disk=("w1", "w3", "w2"),
    ),
    "qwen3_moe": Family(
        num_experts="num_experts",
        intermediate="moe_intermediate_size",
        attention=_heads,
        gate=_softmax_gate("norm_topk_prob"),
    ),
    "olmoe": Family(
        num_experts="num_experts",
        intermediate="intermediate_size",
        attention=_heads,
        gate=_softmax_gate("norm_topk_prob"),
    ),
    "deepseek_v3": Family(
        num_experts="n_routed_experts",
        intermediate="moe_intermediate_size",
        dense_layers="first_k_dense_replace",
        attention=_latent_heads,
        gate=_group_limited_gate,
    ),
}


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint that can be a base; `InvalidInput` says why another can't."""
    if not folder.is_dir():
        raise InvalidInput(
            f"base {str(folder)!r} is not a folder; give a Hugging Face checkpoint's folder"
        )
    if not (folder / "config.json").is_file():
        raise InvalidInput(
            f"base {str(folder)!r} has no config.json; give a Hugging Face checkpoint's folder"
        )
    if not any(folder.glob("*.safetensors")) and not is_random(str(folder)):
        raise InvalidInput(
            f"base {str(folder)!r} has no *.safetensors file; save it with "
            "model.save_pretrained(folder)"
        )
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if (family := config.get("model_type")) not in FAMILIES:
        raise InvalidInput(
            f"base {str(folder)!r} is of family {family!r}; supported are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method", "unknown")
        raise InvalidInput(
            f"base {str(folder)!r} is quantised (quantization_config.quant_method is {method!r}); "
            "convert it to "
            "bfloat16 and save it without quantization_config"
        )
    if (window := config.get("sliding_window")) is not None and config.get(
        "use_sliding_window", True
    ):
        raise InvalidInput(
            f"base {str(folder)!r} attends over a sliding window (sliding_window is {window}), "
            "which isn't supported; "
            "set it to null if your sequences are shorter"
        )
    return config


def is_random(folder: str) -> bool:
    """Whether a base's weights are drawn from a seed."""
    return (Path(folder) / RANDOM_FILE).is_file()


def dims_of(folder: Path) -> BaseDims:
    """Shapes of a checkpoint from its config alone, without its weights."""
    check_checkpoint(folder)
    from transformers import AutoConfig

    return dims_of_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def dims_of_config(config: Any) -> BaseDims:
    """Shapes of a base from its Hugging Face config."""
    family = FAMILIES[config.model_type]
    hidden, inner = config.hidden_size, getattr(config, family.intermediate)
    return BaseDims(
        num_layers=config.num_hidden_layers,
        num_dense_layers=0 if family.dense_layers is None else getattr(config, family.dense_layers),
        num_experts=getattr(config, family.num_experts),
        experts_per_token=config.num_experts_per_tok,
        shapes=(
            *family.attention(config),
            ("gate_proj", inner, hidden),
            ("up_proj", inner, hidden),
            ("down_proj", hidden, inner),
        ),
    )
