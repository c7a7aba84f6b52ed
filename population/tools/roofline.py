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
from populace.workers.memory import (
    CONTEXT_BYTES,
    RESERVE,
    Held,
    WaveLimits,
    active_parameters,
    cache_bytes,
    held_of,
    plan_memory,
)
from populace.workers.shapes import BaseDims

FP32 = 4
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

    held: Held
    active: float
    """Parameters that a token meets."""

    @property
    def device_bytes(self) -> float:
        return self.held.dense_bytes + self.held.expert_bytes


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
    problem: str
    """Empty if a wave fits."""
    knob: str
    """What to change about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long a wave takes."""

    wave_s: float
    stages: Mapping[str, float]
    """What may be the bottleneck -> seconds."""


def base_of(
    sheet: Sheet, dims: BaseDims, tensors: Mapping[str, int], request: Request, device: Device
) -> Base:
    """The base, and what the fullest device holds of it."""
    sheet.begin("base")
    sheet.add("parameters", sum(tensors.values()), "")
    active = sheet.add("active parameters per token", active_parameters(dims, tensors), "")
    held = held_of(dims, tensors, request.devices, device.weight_bytes)
    return Base(held=held, active=active)


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
    reached = 1 - math.exp(-choices) if layout.expert_rank else 0.0
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
    """What fits on a device, and how large waves can be: as many slots as were asked for, half of
    them in a wave."""
    sheet.begin("device")
    name = {2: "bf16", 4: "fp32"}[device.weight_bytes]
    sheet.add(f"experts of the base ({name})", base.held.expert_bytes, "B")
    sheet.add(f"dense part of the base, replicated ({name})", base.held.dense_bytes, "B")
    most = WaveLimits(
        ranks=request.ranks,
        slots=request.slots,
        adapters=request.slots / 2,
        rows=0,
        prompts=0,
        sequences=0,
        length=request.prompt_tokens + request.completion_tokens,
    )
    context = CONTEXT_BYTES[device.kind]
    fixed = plan_memory(dims, base.held, most, context_bytes=context)
    parts = {part.name: part.size_bytes for own in fixed.phases.values() for part in own}
    slab = [sheet.add(name, parts[name], "B") for name in ("weights of slots", "moments of slots")]
    slab.append(sheet.add("gradients", parts["gradients"], "B"))
    sheet.add("context", parts["context"], "B", "assumed" if device.kind == "cuda" else "derived")
    usable = device.memory_bytes * (1 - RESERVE)
    row = sheet.add("activations per row", _row_bytes(dims, base, request), "B")
    cache = cache_bytes(dims, device.weight_bytes) * adapter.sequences * most.length
    sheet.add("KV cache of one user's rollouts", cache, "B")
    activations = sheet.add("free for activations", usable - fixed.needed("training"), "B")
    pages = sheet.add("free for KV cache", usable - fixed.needed("rollout"), "B")
    sheet.add("memory", device.memory_bytes, "B", "sheet" if device.kind == "cuda" else "assumed")
    group_pages = max(pages, 0.0) * request.devices
    adapters = float(math.floor(min(request.slots / 2, group_pages / max(cache, 1.0))))
    rows = max(activations, 0.0) * request.devices / row
    needed = base.device_bytes + sum(slab)
    is_full = activations <= 0 or pages <= 0 or rows < 1
    problem, knob = _problem(request, device, needed, cache, adapters, is_full)
    return Room(
        slab=sum(slab),
        cache=cache,
        stored_size=layout_of(dims, *request.ranks).size,
        adapters=adapters,
        rows=rows,
        problem=problem,
        knob=knob,
    )


def _problem(
    request: Request, device: Device, needed: float, cache: float, adapters: float, is_full: bool
) -> tuple[str, str]:
    """Why no wave fits, and what to change about it; empty if one does."""
    if request.slots < 2:
        return "no room for a wave: it is half of the slots", "two slots or more"
    if is_full:
        sizes = f"{needed / 1e9:,.0f} GB of {device.memory_bytes / 1e9:,.0f}"
        return (
            f"no room for a wave (base and slots need {sizes})",
            "fewer slots, a lower rank, targets that have less, or more devices",
        )
    if adapters < 1:
        return (
            f"no room for one user's rollouts ({cache / 1e9:,.0f} GB of keys and values)",
            "fewer samples per event, shorter prompts or completions, or more devices",
        )
    return "", ""


def _row_bytes(dims: BaseDims, base: Base, request: Request) -> float:
    """Of one row of a training pass: activations, and its target's slope."""
    one, none = (
        plan_memory(dims, base.held, WaveLimits(ranks=request.ranks, rows=rows), context_bytes=0.0)
        for rows in (1, 0)
    )
    return one.needed("training") - none.needed("training")


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
    layer_row = dims.experts_per_token * _hidden(dims) * device.weight_bytes * away
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
