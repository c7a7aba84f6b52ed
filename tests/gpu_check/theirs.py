"""What `transformers` and `peft` make of the same tensors: no second base on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from populace.workers.actors.engine import ShardEngine


class Theirs:
    """A Qwen3-MoE of transformers' own modules around the tensors of an engine's base."""

    def __init__(self, engine: ShardEngine, config: Any, experts: str) -> None:
        """`experts`: how transformers multiplies them."""
        base = engine.base
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=base.dtype, attn_implementation="sdpa"
            )
        model.set_experts_implementation(experts)
        ours = dict(base.decoder.named_parameters())
        for name, _ in list(model.named_parameters()):
            _put(model, name, self._tensor(base, ours, name))
        model.model.rotary_emb = base.decoder.rotary_emb
        model.eval()
        model.requires_grad_(False)
        self.model, self._peft = model, None

    @staticmethod
    def _tensor(base: Any, ours: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        if name == "lm_head.weight":
            return base.head_VD
        inner = name.removeprefix("model.")
        if inner == "embed_tokens.weight":
            return base.embeddings_VD
        if ".mlp." not in inner:
            return ours[inner]
        block = base.decoder.layers[int(inner.split(".")[1])].mlp
        return {
            "gate_up_proj": block.experts.gate_up_EOD,
            "down_proj": block.experts.down_EDI,
            "weight": block.gate.w_ED,
        }[inner.rpartition(".")[2]]

    def with_lora(self, rank: int, alpha: int) -> None:
        """An adapter on attention, and its AdamW."""
        modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
        self._peft = get_peft_model(self.model, config)
        self._parameters = [p for p in self._peft.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-4, fused=True)

    def without_lora(self) -> None:
        assert self._peft is not None
        self.model, self._peft = self._peft.unload(), None

    def loss(self, ids: np.ndarray) -> float:
        """Mean over a sequence's tokens but the first."""
        with torch.no_grad():
            return float(self._loss(self.model, ids))

    def step(self, ids: np.ndarray) -> None:
        """One user's step."""
        self._loss(self._peft, ids).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def generate(self, ids: np.ndarray, new: int) -> None:
        """Samples `new` tokens for every row."""
        there = torch.from_numpy(ids).long().to(self.model.lm_head.weight.device)
        with torch.no_grad():
            self.model.generate(
                there,
                attention_mask=torch.ones_like(there),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                pad_token_id=0,
            )

    @staticmethod
    def _loss(model: Any, ids: np.ndarray) -> torch.Tensor:
        there = torch.from_numpy(ids).long()[None].to(model.get_output_embeddings().weight.device)
        return model(input_ids=there, labels=there, use_cache=False).loss


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, nn.Parameter(tensor.detach(), requires_grad=False))
