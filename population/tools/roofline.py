"""The arithmetic of a capacity plan: bytes of the base, of an adapter, of a device, and the time of
a wave. Each function writes the lines of its section.

Times are rooflines: the larger of what the arithmetic, the memory and the wires allow, at assumed
efficiencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from populace.population.tools.devices import Device, Request
from populace.workers.layout import layout_of
from populace.workers.shapes import BaseDims
from populace.workers.shards.placement import is_expert, place_shards

FP32, BF16 = 4, 2
"""Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One figure of a plan.

    Example: `Line(section="device", name="memory", value=8e10, unit="B", source="sheet")`."""

    section: str
    name: str
    value: float
    unit: str
    source: str


class Sheet:
    """The lines of a plan as they are written."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._section = ""

    def begin(self, section: str) -> None:
        """Lines from here on are of this section."""
        self._section = section

    def add(self, name: str, value: float, unit: str, source: str = "derived") -> float:
        """Write a line; returns its value."""
        self.lines.append(
            Line(section=self._section, name=name, value=value, unit=unit, source=source)
        )
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base as one device holds it."""

    dense_bytes: float
    expert_bytes: float
    """Experts on the device that holds most of them."""
    most_experts: int
    active: float
    """Parameters that a token meets."""

    @property
    def device_bytes(self) -> float:
        return self.dense_bytes + self.expert_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What one adapter costs per update."""

    tokens: float
    """Tokens of an update, prompts once per event."""
    sequences: int
    """Samples of an update."""
    weights: float
    """Bytes, as moments, evidence and revision."""
    moments: float
    evidence: float

    @property
    def revision(self) -> float:
        return self.weights + self.moments + self.evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What fits on a device."""

    slab: float
    """Bytes of weights, gradients and moments."""
    cache: float
    """Bytes of keys and values of one user's rollouts."""
    stored_size: int
    """Elements of an adapter as a slab keeps it."""
    adapters: float
    """Adapters of a wave."""
    rows: float
    """Rows of a pass."""
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long a wave takes."""

    wave_s: float
    stages: Mapping[str, float]
    """What may be the bottleneck -> seconds."""


def base_of(sheet: Sheet, dims: BaseDims, tensors: Mapping[str, int], request: Request) -> Base:
    """The base, and what the fullest device holds of it."""
    sheet.begin("base")
    placement = place_shards(dims.num_experts, request.devices)
    experts = sum(size for name, size in tensors.items() if is_expert(name))
    dense = sum(tensors.values()) - experts
    sheet.add("parameters", sum(tensors.values()), "")
    active = dense + experts * dims.experts_per_token / dims.num_experts
    sheet.add("active parameters per token", active, "")
    most_experts = max(len(shard.experts) for shard in placement.shards)
    return Base(
        dense_bytes=BF16 * dense,
        expert_bytes=BF16 * experts / dims.num_experts * most_experts,
        most_experts=most_experts,
        active=active,
    )


def adapter_of(sheet: Sheet, dims: BaseDims, request: Request) -> Adapter:
    """One adapter and one update of it."""
    sheet.begin("adapter")
    layout = layout_of(dims, *request.ranks)
    samples = request.samples_per_event
    tokens = request.events_per_update * (
        request.prompt_tokens + samples * request.completion_tokens
    )
    # Uniform routing: an expert is left out only if no token of any layer meets it.
    choices = tokens * dims.num_moe_layers * dims.experts_per_token / dims.num_experts
    reached = 1 - math.exp(-choices)
    elements = layout.dense_size + reached * dims.num_experts * layout.expert_size
    sheet.add("parameters of an adapter", layout.size, "")
    sheet.add("tokens per update", tokens, "tokens")
    sheet.add("experts that an update reaches", reached * dims.num_experts, "experts")
    weights = sheet.add("weights of a revision (fp32)", FP32 * elements, "B")
    moments = sheet.add("moments of a tip (fp32)", 2 * FP32 * elements, "B")
    # Token, log-probability under rollout and base, and int16 expert ids.
    token_bytes = 12 + 2 * dims.num_moe_layers * dims.experts_per_token
    sequences = request.events_per_update * samples
    # A prompt stands beside every sample.
    recorded = sequences * (request.prompt_tokens + request.completion_tokens)
    evidence = sheet.add("evidence of a revision", recorded * token_bytes, "B")
    adapter = Adapter(
        tokens=tokens, sequences=sequences, weights=weights, moments=moments, evidence=evidence
    )
    sheet.add("bytes per revision", adapter.revision, "B")
    return adapter


def room_of(
    sheet: Sheet,
    dims: BaseDims,
    request: Request,
    device: Device,
    base: Base,
    adapter: Adapter,
) -> Room:
    """What fits on a device, and how large waves can be."""
    sheet.begin("device")
    sheet.add("experts of the base (bf16)", base.expert_bytes, "B")
    sheet.add("dense part of the base, replicated (bf16)", base.dense_bytes, "B")
    # A slab keeps room for its own experts, at exact ranks; dense parts are shared out.
    stored = layout_of(dims, *request.ranks)
    dense = stored.dense_size / request.devices
    slot = FP32 * (dense + base.most_experts * stored.expert_size)
    slab = sheet.add("slab: weights and gradients", 2 * slot * request.slots, "B")
    slab_moments = sheet.add("slab: moments", 2 * slot * request.slots, "B")
    left = device.memory_bytes * 0.95 - base.device_bytes - slab - slab_moments
    row_bytes = sheet.add("activations per row", _activations_per_row(dims), "B")
    cache_row = BF16 * dims.num_layers * _cache_width(dims)
    length = request.prompt_tokens + request.completion_tokens
    cache = adapter.sequences * length * cache_row
    sheet.add("KV cache of one user's rollouts", cache, "B")
    group_left = max(left, 0.0) * request.devices
    adapters = float(math.floor(min(request.slots / 2, group_left / max(cache, 1.0))))
    sheet.add("free for activations or KV cache", left, "B")
    sheet.add("memory", device.memory_bytes, "B", "sheet")
    rows = group_left / row_bytes
    return Room(
        slab=slab + slab_moments,
        cache=cache,
        stored_size=stored.size,
        adapters=adapters,
        rows=rows,
        fits=left > 0 and adapters >= 1 and rows >= 1,
    )


def times_of(
    sheet: Sheet,
    dims: BaseDims,
    request: Request,
    device: Device,
    base: Base,
    adapter: Adapter,
    room: Room,
) -> Times:
    """Of one wave, each stage at its roofline."""
    sheet.begin("wave")
    adapters, devices = room.adapters, request.devices
    sheet.add("adapters per wave", adapters, "adapters")
    rows = sheet.add("rows per wave", adapters * adapter.tokens, "rows")
    num_passes = math.ceil(rows / max(room.rows, 1.0)) if rows else 0
    passes = sheet.add("passes per wave", num_passes, "passes")
    rate = device.flops * request.efficiency * devices
    bandwidth = device.memory_bandwidth * request.efficiency
    wire = (device.links if devices <= device.per_node else device.network) * request.efficiency
    sheet.add("efficiency of rates", request.efficiency, "", "assumed")
    away = (devices - 1) / devices
    layer_row = dims.experts_per_token * _hidden(dims) * BF16 * away
    sheet.add("bytes on the wire per layer and row, there and back", 2 * layer_row, "B")

    # A pass of the base alone for its log-probabilities, then forward and backward (a frozen base:
    # dX only).
    products = sheet.add("training: products", 6 * base.active * rows / rate, "s")
    read_s = passes * 3 * base.device_bytes / bandwidth
    streams = sheet.add("training: reading weights", read_s, "s")
    # There and back, three times.
    exchange_s = 6 * layer_row * dims.num_moe_layers * rows / devices / wire
    wires = sheet.add("training: exchange", exchange_s, "s")
    step_bytes = 7 * FP32 * room.stored_size * adapters / devices
    optimizer = sheet.add("optimizer on the slab", step_bytes / bandwidth, "s")

    # Read in a decoding step: the base, the adapters, and on average half of the cache at its
    # fullest.
    num_sequences = adapters * adapter.sequences
    adapter_bytes = FP32 * room.stored_size * adapters / devices
    read = base.device_bytes + adapter_bytes + room.cache * adapters / devices / 2
    step = max(
        2 * base.active * num_sequences / rate,
        read / bandwidth,
        2 * layer_row * dims.num_moe_layers * num_sequences / devices / wire,
    )
    rollout = sheet.add("rollout", step * request.completion_tokens, "s")
    moved = adapters * (adapter.weights + adapter.moments + adapter.revision)
    loads = sheet.add("paging in and committing", moved / request.store_bandwidth, "s")
    whole = max(products, streams, wires) + optimizer + rollout + loads
    return Times(
        wave_s=sheet.add("time of a wave (one stage after the other)", whole, "s"),
        stages={
            "training: products": products,
            "training: reading weights": streams,
            "training: exchange": wires,
            "optimizer on the slab": optimizer,
            "rollout": rollout,
            "paging in and committing": loads,
        },
    )


def _hidden(dims: BaseDims) -> int:
    return next(inp for module, _, inp in dims.shapes if module == "gate_proj")


def _cache_width(dims: BaseDims) -> int:
    """Width of a token's keys and values as the cache keeps them: per head, also where attention is
    latent."""
    outs, inputs = ({module: size[place] for module, *size in dims.shapes} for place in (0, 1))
    if "k_proj" in outs:
        return outs["k_proj"] + outs["v_proj"]
    return outs.get("q_b_proj", outs.get("q_proj", 0)) + inputs["o_proj"]


def _activations_per_row(dims: BaseDims) -> float:
    """What backward needs of a row, bf16: inputs and outputs of the projections that carry LoRA, of
    all its experts."""
    dense = sum(inp + out for module, out, inp in dims.shapes if module in dims.dense_modules)
    expert = sum(inp + out for module, out, inp in dims.shapes if module not in dims.dense_modules)
    return BF16 * (dims.num_layers * dense + dims.num_moe_layers * dims.experts_per_token * expert)
