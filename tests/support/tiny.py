"""Tiny random bases of every family, with a tokenizer: built in seconds, experts distinct,
top-2."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] "
    "}}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "the rain falls on the quiet hills and the river runs to the sea",
    "say yes or no",
    "What is rain?",
]
VOCABULARY = 300


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=TEMPLATE,
    )


def build(family: str, folder: Path, seed: int = 0) -> Path:
    """Save a tiny base of `family` into `folder`. Weights are large enough that experts and routing
    matter: with the usual 0.02 a wrong expert would hide in rounding."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
    }
    latent = {
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "moe_intermediate_size": 24,
        "intermediate_size": 48,
    }  # fmt: skip
    plain = {name: value for name, value in common.items() if name != "head_dim"}
    model: PreTrainedModel
    if family == "mixtral":
        model = MixtralForCausalLM(
            MixtralConfig(**common, intermediate_size=48, num_local_experts=4)
        )
    elif family == "qwen3_moe":
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common,
                intermediate_size=48,
                moe_intermediate_size=24,
                num_experts=6,
                norm_topk_prob=False,
                decoder_sparse_step=1,
            )
        )
    elif family == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(**plain, intermediate_size=24, num_experts=6))
    else:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**plain, **latent}))
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
