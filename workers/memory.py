"""What a shard needs of its device's memory, phase by phase, before anything is loaded.

Arithmetic over a base's shapes and the bounds that the settings give a wave. The largest phase must
fit into what is free; who doesn't fit is refused with the table and with what to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from populace.storage.errors import InvalidInput
from populace.workers.layout import layout_of
from populace.workers.shapes import EXPERT_MODULES, BaseDims
from populace.workers.shards.placement import is_expert, place_shards

FP32 = 4
RESERVE = 0.05
"""Share of free memory that stays free: allocators round up, and fragments remain."""
CONTEXT_BYTES = {"cpu": 450e6, "cuda": 600e6}
"""Code and libraries of a process, before it holds anything: a process of ours on a CPU, measured
(Python, torch, transformers); a CUDA context with cuBLAS' workspace, assumed."""
HEAD_ROWS = 256
"""Rows whose logits exist at once in training."""
NORM_BYTES = 9
"""Of a row's activations per layer and hidden element: what the norms keep in fp32, counted."""


_SMALLER_SLOTS = (
    "lower scheduler.slots, adapter.rank or adapter.expert_rank, or set adapter.targets=attention"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveLimits:
    """What settings let a shard do at once at most."""

    ranks: tuple[int, int] = (8, 1)
    """On attention and on experts."""
    slots: int = 1
    adapters: float = 1
    """Of a wave: those that hold gradients."""
    rows: int = 4096
    """Of a pass."""
    prompts: float = 1
    """Tasks that are tried at once."""
    sequences: float = 1
    """Samples that are decoded at once."""
    length: int = 1024
    """Of a prompt and its completion, in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What of base and adapters is on the fullest shard of a group."""

    dense_bytes: float
    """Of the base, in the dtype it computes in; this and the next."""
    expert_bytes: float
    experts: int
    """Of each layer."""
    homes: float = 1.0
    """Share of the adapters whose dense part is there."""
    dtype_bytes: int
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One line of a plan. Example: `Part(name="gradients", size_bytes=8e8, knob="…")`."""

    name: str
    size_bytes: float
    knob: str
    """What to change for it to be less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What each phase needs."""

    phases: Mapping[str, tuple[Part, ...]]

    def needed(self, phase: str) -> float:
        return sum(part.size_bytes for part in self.phases[phase])

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.needed)

    def fits(self, free_bytes: float) -> bool:
        return self.needed(self.largest) <= free_bytes * (1 - RESERVE)

    def table(self) -> str:
        """Gigabytes by part and phase, a line each."""
        names = list(dict.fromkeys(p.name for own in self.phases.values() for p in own))
        sizes = {(phase, p.name): p.size_bytes for phase, own in self.phases.items() for p in own}
        width = max(map(len, names))
        lines = [f"{'GB':{width}}" + "".join(f"{phase:>12}" for phase in self.phases)]
        for name in names:
            own = [sizes.get((phase, name), 0.0) / 1e9 for phase in self.phases]
            lines.append(f"{name:{width}}" + "".join(f"{size:12.2f}" for size in own))
        total = [self.needed(phase) / 1e9 for phase in self.phases]
        lines.append(f"{'together':{width}}" + "".join(f"{size:12.2f}" for size in total))
        return "\n".join(lines)

    def require(self, free_bytes: float, device: str) -> None:
        """`InvalidInput` with the table, and what to change about its largest part, unless it
        fits."""
        if self.fits(free_bytes):
            return
        needed = self.needed(self.largest)
        worst = max(self.phases[self.largest], key=lambda part: part.size_bytes)
        raise InvalidInput(
            f"{self.largest} needs {needed / 1e9:.2f} GB of {device}, where "
            f"{free_bytes / 1e9:.2f} GB are free and {RESERVE:.0%} of them stay so; {worst.knob}\n"
            f"{self.table()}"
        )


def plan_memory(
    dims: BaseDims, held: Held, limits: WaveLimits, *, context_bytes: float
) -> MemoryPlan:
    """What the fullest shard needs to train and to roll out. `context_bytes`: of a process that
    holds nothing yet, see `CONTEXT_BYTES`."""
    slot = slot_bytes(dims, held, limits.ranks)
    width = held.dtype_bytes
    # Logits of one chunk in the base's dtype and in fp32, and the slope of every target.
    head = HEAD_ROWS * held.vocabulary * (width + FP32) + limits.rows * _hidden(dims) * width
    # Logits, probabilities, and the fp64 sums of the draw.
    drawing = limits.sequences * held.vocabulary * (width + 2 * FP32 + 2 * FP32)
    always = (
        Part(
            name="base",
            size_bytes=held.dense_bytes + held.expert_bytes,
            knob="raise shard.count, which splits the experts, or take a smaller base",
        ),
        Part(name="weights of slots", size_bytes=slot * limits.slots, knob=_SMALLER_SLOTS),
        Part(name="moments of slots", size_bytes=2 * slot * limits.slots, knob=_SMALLER_SLOTS),
        Part(
            name="context",
            size_bytes=context_bytes,
            knob="use a device with more memory",
        ),
    )
    training = (
        Part(
            name="gradients",
            size_bytes=slot * limits.adapters,
            knob="lower scheduler.max_adapters_per_wave",
        ),
        Part(
            name="activations",
            size_bytes=limits.rows * row_bytes(dims, limits.ranks, width),
            knob="lower train.max_rows_per_pass",
        ),
        Part(name="workspace", size_bytes=head, knob="lower train.max_rows_per_pass"),
    )
    # Prompts run as one pass, whose keys and values are kept until they are spread to the samples.
    prompt = cache_bytes(dims, width) + layer_bytes(dims, width)
    rollout = (
        Part(
            name="prompts",
            size_bytes=limits.prompts * limits.length * prompt,
            knob="lower scheduler.max_adapters_per_wave, scheduler.events_per_update or "
            "train.max_sequence_length",
        ),
        Part(
            name="keys and values",
            size_bytes=limits.sequences * limits.length * cache_bytes(dims, width),
            knob="lower scheduler.max_adapters_per_wave, rollout.samples_per_task or "
            "train.max_sequence_length",
        ),
        Part(
            name="workspace",
            size_bytes=drawing,
            knob="lower scheduler.max_adapters_per_wave or rollout.samples_per_task",
        ),
    )
    return MemoryPlan(phases={"training": always + training, "rollout": always + rollout})


def slot_bytes(dims: BaseDims, held: Held, ranks: tuple[int, int]) -> float:
    """One fp32 tensor of an adapter as this shard keeps it, at exact ranks."""
    layout = layout_of(dims, *ranks)
    return FP32 * (layout.dense_size * held.homes + held.experts * layout.expert_size)


def row_bytes(dims: BaseDims, ranks: tuple[int, int], dtype_bytes: int) -> float:
    """What backward needs of one row: inputs and outputs of the projections that carry LoRA, of all
    its experts; what the norms keep; the narrow products of its adapter."""
    dense = [(inp + out) for module, out, inp in dims.shapes if module not in EXPERT_MODULES]
    expert = [(inp + out) for module, out, inp in dims.shapes if module in EXPERT_MODULES]
    rank, expert_rank = ranks
    of_layers = sum(dense) + rank * len(dense)
    of_experts = dims.experts_per_token * (sum(expert) + expert_rank * len(expert))
    kept = dims.num_layers * of_layers + dims.num_moe_layers * of_experts
    return dtype_bytes * kept + NORM_BYTES * dims.num_layers * _hidden(dims)


def layer_bytes(dims: BaseDims, dtype_bytes: int) -> float:
    """What one layer of a pass that keeps nothing has of a row at its widest: its experts' copies,
    in and out."""
    expert = {module: (out, inp) for module, out, inp in dims.shapes}
    inner, hidden = expert["gate_proj"]
    return float(dtype_bytes * (4 * hidden + dims.experts_per_token * (2 * hidden + 3 * inner)))


def cache_bytes(dims: BaseDims, dtype_bytes: int) -> float:
    """Keys and values of one token in all layers, as the cache keeps them: per head, also where
    attention is latent."""
    outs, inputs = ({module: size[place] for module, *size in dims.shapes} for place in (0, 1))
    if "k_proj" in outs:
        width = outs["k_proj"] + outs["v_proj"]
    else:
        width = outs.get("q_b_proj", outs.get("q_proj", 0)) + inputs["o_proj"]
    return float(dtype_bytes * dims.num_layers * width)


def held_of(dims: BaseDims, tensors: Mapping[str, int], num_shards: int, dtype_bytes: int) -> Held:
    """What the fullest of `num_shards` holds. `tensors`: name on disk -> elements, of the whole
    base."""
    placement = place_shards(dims.num_experts, num_shards)
    experts = max(len(shard.experts) for shard in placement.shards)
    of_experts = sum(size for name, size in tensors.items() if is_expert(name))
    return Held(
        dense_bytes=dtype_bytes * (sum(tensors.values()) - of_experts),
        expert_bytes=dtype_bytes * of_experts / dims.num_experts * experts,
        experts=experts,
        homes=1 / num_shards,
        dtype_bytes=dtype_bytes,
        vocabulary=tensors["model.embed_tokens.weight"] // _hidden(dims),
    )


def active_parameters(dims: BaseDims, tensors: Mapping[str, int]) -> float:
    """Parameters of a base that a token meets. `tensors`: name on disk -> elements."""
    experts = sum(size for name, size in tensors.items() if is_expert(name))
    dense = sum(tensors.values()) - experts
    return dense + experts * dims.experts_per_token / dims.num_experts


def _hidden(dims: BaseDims) -> int:
    return next(inp for module, _, inp in dims.shapes if module == "gate_proj")
