"""The frozen base: a Hugging Face MoE model whose projections, MoE blocks and attention are ours.

Everything else (embeddings, norms, rotary positions, shared experts, the order of a layer) stays
the family's own code from `transformers`. The model is built on the meta device and filled tensor
by tensor with what this shard holds.

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
from populace.workers.base.checkpoint import Weights, weights_of
from populace.workers.base.families import FAMILIES, Family, check_checkpoint, dims_of
from populace.workers.base.forward import ForwardPass, PassHolder
from populace.workers.base.moe import Experts, MoeBlock
from populace.workers.device import Device
from populace.workers.shards.exchange import ALONE, Exchange, partition_dense
from populace.workers.shards.placement import place_shards

_INTERFACE = "populace"


class LoraLinear(nn.Module):
    """A frozen projection plus every row's own adapter."""

    def __init__(self, inner: nn.Linear, module: str, layer: int, holder: PassHolder) -> None:
        super().__init__()
        # The parameters themselves, not their data: ZeRO-3 swaps that before and after this
        # module's turn.
        self.weight, self.bias = inner.weight, inner.bias
        self.base = FrozenProduct(w=inner.weight, bias_F=inner.bias)
        self.module, self.layer, self.holder = module, layer, holder

    def forward(self, x: Tensor) -> Tensor:
        """[..., T, D] -> [..., T, F], with leading dimensions of 1."""
        forward_pass = self.holder.current
        weights = forward_pass.lora([self.module], self.layer)
        y_TF = lora_product(
            x.flatten(0, -2), self.base, weights, forward_pass.plan, forward_pass.kernels.backend
        )
        return y_TF.view(*x.shape[:-1], -1)


class BaseModel:
    """One shard of the base: everything but the experts, and its own of those. Holds no adapter and
    no state between passes."""

    def __init__(
        self,
        folder: Path,
        device: Device,
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
        self.exchange, self.device, self.dtype = exchange, device, device.dtype
        AttentionInterface.register(_INTERFACE, _attend)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        weights = weights_of(folder, device)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=device.dtype, attn_implementation=_INTERFACE
            )
        model.requires_grad_(False)
        model.eval()
        self._holder = PassHolder()
        self.decoder = model.model
        # Its buffers are computed, not stored.
        self.decoder.rotary_emb = type(self.decoder.rotary_emb)(config=model.config)
        for name, buffer in self.decoder.rotary_emb.named_buffers():
            setattr(self.decoder.rotary_emb, name, device.place(buffer))
        for layer, block in enumerate(self.decoder.layers):
            self._load_layer(weights, family, config, layer, block)
        self._fill(weights, family, "model.embed_tokens", self.decoder.embed_tokens)
        self._fill(weights, family, "model.norm", self.decoder.norm)
        if not config.tie_word_embeddings:
            self._fill(weights, family, "lm_head", model.lm_head)
        self.embeddings_VD: Tensor = model.model.embed_tokens.weight
        self.head_VD: Tensor = (
            self.embeddings_VD if config.tie_word_embeddings else model.lm_head.weight
        )
        # The rows of a pass come embedded.
        self.decoder.embed_tokens = nn.Identity()
        self.bytes_read = weights.bytes_read
        if dense == "zero3":
            partition_dense(self.decoder)

    def _load_layer(
        self, weights: Weights, family: Family, config: Any, layer: int, block: Any
    ) -> None:
        """Read one layer's dense part and this shard's experts, and put our modules in the place of
        the family's."""
        is_moe = hasattr(block.mlp, "experts")
        if is_moe != (layer >= self.dims.num_dense_layers):
            raise InvalidInput(
                f"layer {layer} of the base has {'experts' if is_moe else 'no experts'}; only "
                "leading layers may be "
                "without"
            )
        if is_moe:
            act_fn = block.mlp.experts.act_fn
            del block.mlp.experts
        self._fill(weights, family, f"model.layers.{layer}", block)
        attention = block.self_attn
        attention.populace_holder = self._holder
        for module in self.dims.dense_modules:
            setattr(
                attention,
                module,
                LoraLinear(getattr(attention, module), module, layer, self._holder),
            )
        if is_moe:
            experts = self._read_experts(weights, family, layer, act_fn)
            gate = family.gate(config, block.mlp.gate)
            shared = getattr(block.mlp, "shared_experts", None)
            moe_layer = layer - self.dims.num_dense_layers
            block.mlp = MoeBlock(
                experts, gate, shared, layer=layer, moe_layer=moe_layer, placement=self.placement,
                rank=self.shard.rank,
                exchange=self.exchange, holder=self._holder, device=self.device,
            )  # fmt: skip

    def _read_experts(self, weights: Weights, family: Family, layer: int, act_fn: Any) -> Experts:
        shapes = {module: (out, inp) for module, out, inp in self.dims.shapes}
        inner, hidden = shapes["gate_proj"]
        num_own = len(self.shard.experts)
        gate_up_EOD = self.device.empty(num_own, 2 * inner, hidden)
        down_EDI = self.device.empty(num_own, hidden, inner)
        for place, expert in enumerate(self.shard.experts):
            names = family.expert_on_disk(layer, expert)
            targets = (gate_up_EOD[place, :inner], gate_up_EOD[place, inner:], down_EDI[place])
            weights.read_into(dict(zip(names, targets, strict=True)))
        return Experts(gate_up_EOD=gate_up_EOD, down_EDI=down_EDI, act_fn=act_fn)

    def _fill(self, weights: Weights, family: Family, prefix: str, module: nn.Module) -> None:
        """Read the values of `module`'s parameters and stored buffers, which are on the meta
        device."""
        parameters = dict(module.named_parameters())
        wanted = {name: parameter.dtype for name, parameter in parameters.items()}
        # What a family stores as a buffer (a selection bias) it wants in fp32.
        stored = module.state_dict()
        wanted |= {name: torch.float32 for name, _ in module.named_buffers() if name in stored}
        values = {
            name: self.device.empty(*stored[name].shape, dtype=dtype)
            for name, dtype in wanted.items()
        }
        weights.read_into({family.on_disk(f"{prefix}.{name}"): values[name] for name in wanted})
        for name, value in values.items():
            owner, _, own_name = name.rpartition(".")
            filled = nn.Parameter(value, requires_grad=False) if name in parameters else value
            setattr(module.get_submodule(owner), own_name, filled)

    @property
    def routing_shape(self) -> tuple[int, int]:
        """(layers with experts, experts per token)."""
        return self.dims.num_moe_layers, self.dims.experts_per_token

    def hidden(self, forward_pass: ForwardPass) -> Tensor:
        """The last hidden states of the pass's rows, after the final norm: [T, D]."""
        self._holder.set(forward_pass)
        try:
            # The embedding must ask for a gradient, or the first layers' adapters would get none.
            embedded_TD = self.embeddings_VD[forward_pass.rows.token_T].requires_grad_(
                torch.is_grad_enabled()
            )
            output = self.decoder(
                inputs_embeds=embedded_TD.unsqueeze(0),
                position_ids=forward_pass.rows.position_T.unsqueeze(0),
                use_cache=False,
            )
        finally:
            self._holder.set(None)
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] fp32."""
        return linear(hidden_TD, self.head_VD).float()


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
    holder: PassHolder = module.populace_holder  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    out_THX = holder.current.attention.attend(layer, query[0], key[0], value[0], scaling)
    return out_THX.unsqueeze(0), None
