"""The frozen base: a Hugging Face MoE model whose projections, MoE blocks and attention are ours.

Everything else (embeddings, norms, rotary positions, the order of a layer) stays the family's own code from
`transformers`, so a family is supported once its projections and its gate are described in `FAMILIES`.

Suffixes: T rows, D hidden, N targets, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from populace.kernels.lora import FrozenProduct, lora_product
from populace.storage.errors import InvalidInput
from populace.workers.layout import DENSE_MODULES, BaseDims
from populace.workers.moe import MoeBlock
from populace.workers.rows import PackedRows
from populace.workers.step import Step, StepHolder

_INTERFACE = "populace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family's config says what its gate does."""

    num_experts: str
    intermediate: str
    """Config field of an expert's inner width."""
    normalise: str | None
    """Config field of top-k normalisation; None: always."""


FAMILIES = {
    "mixtral": Family(num_experts="num_local_experts", intermediate="intermediate_size", normalise=None),
    "qwen3_moe": Family(num_experts="num_experts", intermediate="moe_intermediate_size", normalise="norm_topk_prob"),
}


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint that can be a base; `InvalidInput` says why another can't."""
    if not folder.is_dir():
        raise InvalidInput(f"base {str(folder)!r} is not a folder; give a Hugging Face checkpoint's folder")
    if not (folder / "config.json").is_file():
        raise InvalidInput(f"base {str(folder)!r} has no config.json; give a Hugging Face checkpoint's folder")
    if not any(folder.glob("*.safetensors")):
        raise InvalidInput(
            f"base {str(folder)!r} has no *.safetensors file; save it with model.save_pretrained(folder)"
        )
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if (family := config.get("model_type")) not in FAMILIES:
        raise InvalidInput(f"base {str(folder)!r} is of family {family!r}; supported are {', '.join(sorted(FAMILIES))}")
    return config


def resolve_dtype(name: str) -> torch.dtype:
    """`auto`: bfloat16 where the processor multiplies it natively; elsewhere it is emulated, at an eighth of
    the speed of fp32 forward and less than a hundredth backward (docs/decisions/0001)."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if torch.cuda.is_available():
        return torch.bfloat16
    native = any(bool(torch.cpu.get_capabilities().get(flag)) for flag in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return torch.bfloat16 if native else torch.float32


def dims_of(folder: Path) -> BaseDims:
    """Shapes of a checkpoint from its config alone, without its weights."""
    family = FAMILIES[check_checkpoint(folder)["model_type"]]
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    hidden, inner = config.hidden_size, getattr(config, family.intermediate)
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, key_value = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return BaseDims(
        num_layers=config.num_hidden_layers,
        num_experts=getattr(config, family.num_experts),
        experts_per_token=config.num_experts_per_tok,
        shapes=(
            ("q_proj", query, hidden),
            ("k_proj", key_value, hidden),
            ("v_proj", key_value, hidden),
            ("o_proj", hidden, query),
            ("gate_proj", inner, hidden),
            ("up_proj", inner, hidden),
            ("down_proj", hidden, inner),
        ),
    )


class LoraLinear(nn.Module):
    """A frozen projection plus every row's own adapter."""

    def __init__(self, inner: nn.Linear, module: str, layer: int, holder: StepHolder) -> None:
        super().__init__()
        self.base = FrozenProduct(w=inner.weight.data, bias_F=None if inner.bias is None else inner.bias.data)
        self.module, self.layer, self.holder = module, layer, holder

    def forward(self, x_1TD: Tensor) -> Tensor:
        step = self.holder.step
        weights = [step.lora(self.module, self.layer)]
        return lora_product(x_1TD[0], self.base, weights, step.plan, step.kernels.backend).unsqueeze(0)


class BaseModel:
    """One shard of the base. Holds no adapter and no state between passes."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        config = check_checkpoint(folder)
        family = FAMILIES[config["model_type"]]
        AttentionInterface.register(_INTERFACE, _attend)
        transformers_logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=_INTERFACE, local_files_only=True
        )
        model.requires_grad_(False)
        model.eval()
        self.dtype = dtype
        self.decoder = model.model
        self.head_VD: Tensor = model.lm_head.weight.data
        self.embeddings_VD: Tensor = model.model.embed_tokens.weight.data
        self._holder = StepHolder()
        normalise = family.normalise is None or bool(getattr(model.config, family.normalise))
        self._replace_modules(model.config, normalise)
        self.dims = dims_of(folder)

    @property
    def routing_shape(self) -> tuple[int, int]:
        """(layers, experts per token)."""
        return self.dims.num_layers, self.dims.experts_per_token

    def hidden(self, step: Step) -> Tensor:
        """The last hidden states of the step's rows, after the final norm: [T, D]."""
        self._holder.set(step)
        try:
            # The embedding must ask for a gradient, or the first layers' adapters would get none.
            embedded_TD = self.embeddings_VD[step.rows.token_T].requires_grad_(torch.is_grad_enabled())
            output = self.decoder(
                inputs_embeds=embedded_TD.unsqueeze(0),
                position_ids=step.rows.position_T.unsqueeze(0),
                use_cache=False,
            )
        finally:
            self._holder.set(None)
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] fp32."""
        return linear(hidden_TD, self.head_VD).float()

    def _replace_modules(self, config: Any, normalise: bool) -> None:
        for layer, block in enumerate(self.decoder.layers):
            if not hasattr(block.mlp, "experts"):
                raise InvalidInput(
                    f"layer {layer} of the base has no experts; layers that mix dense and MoE aren't supported"
                )
            attention = block.self_attn
            attention.populace_holder = self._holder
            for module in DENSE_MODULES:
                setattr(attention, module, LoraLinear(getattr(attention, module), module, layer, self._holder))
            block.mlp = MoeBlock(block.mlp, layer, config.num_experts_per_tok, normalise, self._holder)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, T, X] in, [1, T, H, X] out."""
    holder: StepHolder = module.populace_holder  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    out_THX = holder.step.attention.attend(layer, query[0], key[0], value[0], scaling)
    return out_THX.unsqueeze(0), None


class _TokenLogprobs(torch.autograd.Function):
    """log-softmax of the head at the target tokens, in row chunks: the [N, V] logits never exist at once.

    d logprob / d hidden = head[token] - softmax · head does not depend on the loss: forward computes it while the
    chunk's logits are there, and backward only scales it.
    """

    CHUNK = 256

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, rows: PackedRows, row_multiple: int) -> Tensor:
        num_targets, wants_grad = len(rows.target_row_N), ctx.needs_input_grad[0]
        # Dividing the hidden state is dividing the logits by the temperature.
        inverse_N1 = (1 / rows.temperature_N)[:, None].to(hidden_TD.dtype)
        logprob_N = torch.empty(num_targets)
        slope_ND = hidden_TD.new_empty(num_targets if wants_grad else 0, hidden_TD.shape[1])
        logits_CV = head_VD.new_empty(_TokenLogprobs.CHUNK, len(head_VD))
        logsoft_CV = torch.empty_like(logits_CV, dtype=torch.float32)
        for start in range(0, num_targets, _TokenLogprobs.CHUNK):
            part = slice(start, min(start + _TokenLogprobs.CHUNK, num_targets))
            size = part.stop - start
            padded = -(-size // row_multiple) * row_multiple
            hidden_CD = hidden_TD.new_zeros(padded, hidden_TD.shape[1])
            hidden_CD[:size] = hidden_TD.index_select(0, rows.target_row_N[part]).mul_(inverse_N1[part])
            logits, logsoft = logits_CV[:padded], logsoft_CV[:padded]
            torch.mm(hidden_CD, head_VD.T, out=logits)
            torch.log_softmax(logits, 1, dtype=torch.float32, out=logsoft)
            logprob_N[part] = logsoft[:size].gather(1, rows.target_token_N[part, None]).squeeze(1)
            if wants_grad:
                mean_CD = logsoft.exp_().to(head_VD.dtype) @ head_VD
                slope = head_VD.index_select(0, rows.target_token_N[part]).sub_(mean_CD[:size])
                torch.mul(slope, inverse_N1[part], out=slope_ND[part])
        ctx.save_for_backward(slope_ND)
        ctx.num_rows, ctx.row_N = len(hidden_TD), rows.target_row_N
        return logprob_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope_ND,) = ctx.saved_tensors
        grad_ND = (slope_ND * grads[0].unsqueeze(1)).to(slope_ND.dtype)
        # A prompt's last row predicts the first token of every branch: index_add_ adds them in order.
        grad_TD = slope_ND.new_zeros(ctx.num_rows, slope_ND.shape[1]).index_add_(0, ctx.row_N, grad_ND)
        return grad_TD, None, None, None


def token_logprobs(base: BaseModel, hidden_TD: Tensor, step: Step) -> Tensor:
    """Log-probability of every target token of the step's rows, [N] fp32; differentiable."""
    logprob_N: Tensor = _TokenLogprobs.apply(hidden_TD, base.head_VD, step.rows, step.kernels.row_multiple)  # type: ignore[no-untyped-call]
    return logprob_N
