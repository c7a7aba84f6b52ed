"""The frozen base: a Hugging Face MoE model whose projections, MoE blocks and attention are ours.

Everything else (embeddings, norms, rotary positions, shared experts, the order of a layer) stays the family's own code
from `transformers`. The model is built on the meta device and filled tensor by tensor with what this shard holds.

Suffixes: T rows, D hidden, N targets, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from populace.kernels.lora import FrozenProduct, lora_product
from populace.storage.errors import InvalidInput
from populace.workers.checkpoint import Checkpoint
from populace.workers.exchange import ALONE, Exchange, partition_dense
from populace.workers.families import FAMILIES, Family, check_checkpoint, dims_of
from populace.workers.moe import Experts, MoeBlock
from populace.workers.placement import place_shards
from populace.workers.rows import PackedRows
from populace.workers.step import Step, StepHolder

_INTERFACE = "populace"


def resolve_dtype(name: str) -> torch.dtype:
    """`auto`: bfloat16 where the processor multiplies it natively; elsewhere it is emulated, at an eighth of
    the speed of fp32 forward and less than a hundredth backward (docs/decisions/0001)."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if torch.cuda.is_available():
        return torch.bfloat16
    native = any(bool(torch.cpu.get_capabilities().get(flag)) for flag in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return torch.bfloat16 if native else torch.float32


class LoraLinear(nn.Module):
    """A frozen projection plus every row's own adapter."""

    def __init__(self, inner: nn.Linear, module: str, layer: int, holder: StepHolder) -> None:
        super().__init__()
        # The parameters themselves, not their data: ZeRO-3 swaps that before and after this module's turn.
        self.weight, self.bias = inner.weight, inner.bias
        self.base = FrozenProduct(w=inner.weight, bias_F=inner.bias)
        self.module, self.layer, self.holder = module, layer, holder

    def forward(self, x: Tensor) -> Tensor:
        """[..., T, D] -> [..., T, F], with leading dimensions of 1."""
        step = self.holder.step
        weights = [step.lora(self.module, self.layer)]
        y_TF = lora_product(x.flatten(0, -2), self.base, weights, step.plan, step.kernels.backend)
        return y_TF.view(*x.shape[:-1], -1)


class BaseModel:
    """One shard of the base: everything but the experts, and its own of those. Holds no adapter and no state between
    passes."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        rank: int = 0,
        num_shards: int = 1,
        exchange: Exchange = ALONE,
        *,
        dense: str = "replicated",
    ) -> None:
        """`dense`: see `shard.dense` in configs/schema.py."""
        family, self.dims = FAMILIES[check_checkpoint(folder)["model_type"]], dims_of(folder)
        self.placement = place_shards(self.dims.num_experts, num_shards)
        self.shard = self.placement.shards[rank]
        self.exchange, self.dtype = exchange, dtype
        AttentionInterface.register(_INTERFACE, _attend)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        checkpoint = Checkpoint(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_INTERFACE)
        model.requires_grad_(False)
        model.eval()
        self._holder = StepHolder()
        self.decoder = model.model
        # Its buffers are computed, not stored.
        self.decoder.rotary_emb = type(self.decoder.rotary_emb)(config=model.config)
        for layer, block in enumerate(self.decoder.layers):
            self._load_layer(checkpoint, family, config, layer, block)
        _fill(checkpoint, family, "model.embed_tokens", self.decoder.embed_tokens)
        _fill(checkpoint, family, "model.norm", self.decoder.norm)
        if not config.tie_word_embeddings:
            _fill(checkpoint, family, "lm_head", model.lm_head)
        self.embeddings_VD: Tensor = model.model.embed_tokens.weight
        self.head_VD: Tensor = self.embeddings_VD if config.tie_word_embeddings else model.lm_head.weight
        # The rows of a step come embedded.
        self.decoder.embed_tokens = nn.Identity()
        self.bytes_read = checkpoint.bytes_read
        if dense == "zero3":
            partition_dense(self.decoder)

    def _load_layer(self, checkpoint: Checkpoint, family: Family, config: Any, layer: int, block: Any) -> None:
        """Read one layer's dense part and this shard's experts, and put our modules in the place of the family's."""
        is_moe = hasattr(block.mlp, "experts")
        if is_moe != (layer >= self.dims.num_dense_layers):
            raise InvalidInput(
                f"layer {layer} of the base has {'experts' if is_moe else 'no experts'}; only leading layers may be "
                "without"
            )
        if is_moe:
            act_fn = block.mlp.experts.act_fn
            del block.mlp.experts
        _fill(checkpoint, family, f"model.layers.{layer}", block)
        attention = block.self_attn
        attention.populace_holder = self._holder
        for module in self.dims.dense_modules:
            setattr(attention, module, LoraLinear(getattr(attention, module), module, layer, self._holder))
        if is_moe:
            experts = self._read_experts(checkpoint, family, layer, act_fn)
            gate = family.gate(config, block.mlp.gate)
            shared = getattr(block.mlp, "shared_experts", None)
            moe_layer = layer - self.dims.num_dense_layers
            block.mlp = MoeBlock(
                experts, gate, shared, layer=layer, moe_layer=moe_layer, placement=self.placement, rank=self.shard.rank,
                exchange=self.exchange, holder=self._holder,
            )  # fmt: skip

    def _read_experts(self, checkpoint: Checkpoint, family: Family, layer: int, act_fn: Any) -> Experts:
        shapes = {module: (out, inp) for module, out, inp in self.dims.shapes}
        inner, hidden = shapes["gate_proj"]
        num_own = len(self.shard.experts)
        gate_up_EOD = torch.empty(num_own, 2 * inner, hidden, dtype=self.dtype)
        down_EDI = torch.empty(num_own, hidden, inner, dtype=self.dtype)
        for place, expert in enumerate(self.shard.experts):
            names = family.expert_on_disk(layer, expert)
            targets = (gate_up_EOD[place, :inner], gate_up_EOD[place, inner:], down_EDI[place])
            checkpoint.read_into(dict(zip(names, targets, strict=True)))
        return Experts(gate_up_EOD=gate_up_EOD, down_EDI=down_EDI, act_fn=act_fn)

    @property
    def routing_shape(self) -> tuple[int, int]:
        """(layers with experts, experts per token)."""
        return self.dims.num_moe_layers, self.dims.experts_per_token

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


def _fill(checkpoint: Checkpoint, family: Family, prefix: str, module: nn.Module) -> None:
    """Read the values of `module`'s parameters and stored buffers, which are on the meta device."""
    parameters = dict(module.named_parameters())
    wanted = {name: parameter.dtype for name, parameter in parameters.items()}
    # What a family stores as a buffer (a selection bias) it wants in fp32.
    wanted |= {name: torch.float32 for name, _ in module.named_buffers() if name in module.state_dict()}
    values = checkpoint.read({family.on_disk(f"{prefix}.{name}"): dtype for name, dtype in wanted.items()})
    for name, value in zip(wanted, values, strict=True):
        owner, _, own_name = name.rpartition(".")
        filled = nn.Parameter(value, requires_grad=False) if name in parameters else value
        setattr(module.get_submodule(owner), own_name, filled)


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
