"""Capacity planning: what a population costs on given devices, before anybody pays for them.

Arithmetic over a base's shapes and a device's data sheet. Every line says where it comes from:
`sheet` (the vendor's data sheet), `given` (asked for), `derived` (follows from the others) or
`assumed`. Nothing here is measured. Times are rooflines: the larger of what the arithmetic, the
memory and the wires allow, at assumed efficiencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from populace.population.ledger.heartbeat import HEARTBEAT_S
from populace.storage.errors import InvalidInput
from populace.workers.layout import layout_of, stored_rank
from populace.workers.shapes import BaseDims
from populace.workers.shards.placement import is_expert, place_shards

DAYS_PER_YEAR = 365.25

FP32, BF16 = 4, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, from its data sheet: dense bf16 rate, memory, wires per direction."""

    flops: float
    memory_bytes: float
    memory_bandwidth: float
    """Bytes per second."""
    links: float
    """Bytes per second to the other devices of its node."""
    network: float
    """Bytes per second to other nodes."""
    per_node: int


DEVICES: Mapping[str, Device] = {
    "a100": Device(
        flops=312e12,
        memory_bytes=80e9,
        memory_bandwidth=2.04e12,
        links=300e9,
        network=25e9,
        per_node=8,
    ),
    "h100": Device(
        flops=989e12,
        memory_bytes=80e9,
        memory_bandwidth=3.35e12,
        links=450e9,
        network=50e9,
        per_node=8,
    ),
    "h200": Device(
        flops=989e12,
        memory_bytes=141e9,
        memory_bandwidth=4.8e12,
        links=450e9,
        network=50e9,
        per_node=8,
    ),
    "b200": Device(
        flops=2250e12,
        memory_bytes=180e9,
        memory_bandwidth=7.7e12,
        links=900e9,
        network=50e9,
        per_node=8,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be planned."""

    device: str
    devices: int
    users: float
    updates_per_user_and_day: float
    rank: int
    expert_rank: int
    events_per_update: int
    samples_per_event: int
    prompt_tokens: int
    completion_tokens: int
    slots: int
    """Adapters in device memory at a time, over the whole group."""
    kept_revisions: int
    efficiency: float
    """Share of the data sheet's rates that products and wires reach."""
    store_bandwidth: float
    """Bytes per second that the object store takes and gives, all nodes together."""
    partitions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    section: str
    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    lines: tuple[Line, ...]
    fits: bool
    bottleneck: str
    knob: str
    """What to change about it."""

    def value(self, name: str) -> float:
        return next(line.value for line in self.lines if line.name == name)


def check(request: Request) -> None:
    """`InvalidInput` names the field, the value and the way out."""
    if request.device not in DEVICES:
        raise InvalidInput(f"device is {request.device!r}; use one of {', '.join(DEVICES)}")
    for name in Request.__dataclass_fields__:
        value = getattr(request, name)
        if name != "device" and not value > 0:
            raise InvalidInput(f"{name.replace('_', '-')} is {value}; use a number above zero")
    if request.efficiency > 1:
        raise InvalidInput(f"efficiency is {request.efficiency}; use a share of at most 1")


def plan(dims: BaseDims, tensors: Mapping[str, int], request: Request) -> Plan:
    """`tensors`: name on disk -> elements, of the whole base in bf16."""
    check(request)
    device = DEVICES[request.device]
    placement = place_shards(dims.num_experts, request.devices)
    lines: list[Line] = []

    def add(section: str, name: str, value: float, unit: str, source: str = "derived") -> float:
        lines.append(Line(section=section, name=name, value=value, unit=unit, source=source))
        return value

    # The base.
    expert_elements = sum(size for name, size in tensors.items() if is_expert(name))
    dense_elements = sum(tensors.values()) - expert_elements
    most_experts = max(len(shard.experts) for shard in placement.shards)
    add("base", "parameters", sum(tensors.values()), "")
    active = dense_elements + expert_elements * dims.experts_per_token / dims.num_experts
    add("base", "active parameters per token", active, "")

    # One adapter.
    layout = layout_of(dims, request.rank, request.expert_rank)
    tokens = request.events_per_update * (
        request.prompt_tokens + request.samples_per_event * request.completion_tokens
    )
    # Uniform routing: an expert is left out only if no token of any layer meets it.
    choices = tokens * dims.num_moe_layers * dims.experts_per_token / dims.num_experts
    reached = 1 - math.exp(-choices)
    elements = layout.dense_size + reached * dims.num_experts * layout.expert_size
    add("adapter", "parameters of an adapter", layout.size, "")
    add("adapter", "tokens per update", tokens, "tokens")
    add("adapter", "experts that an update reaches", reached * dims.num_experts, "experts")
    weights = add("adapter", "weights of a revision (fp32)", FP32 * elements, "B")
    moments = add("adapter", "moments of a tip (fp32)", 2 * FP32 * elements, "B")
    # Token, log-probability under rollout and base, and int16 expert ids.
    token_bytes = 12 + 2 * dims.num_moe_layers * dims.experts_per_token
    sequences = request.events_per_update * request.samples_per_event
    recorded = sequences * (
        request.prompt_tokens + request.completion_tokens
    )  # a prompt stands beside every sample
    evidence = add("adapter", "evidence of a revision", recorded * token_bytes, "B")
    revision = add("adapter", "bytes per revision", weights + moments + evidence, "B")

    # One device.
    expert_bytes = BF16 * expert_elements / dims.num_experts
    base_bytes = add("device", "experts of the base (bf16)", expert_bytes * most_experts, "B")
    dense_bytes = add(
        "device", "dense part of the base, replicated (bf16)", BF16 * dense_elements, "B"
    )
    # A slab pads ranks, keeps room for the dense part on every device, and for its own experts.
    stored = layout_of(
        dims, *(stored_rank(rank, torch.bfloat16) for rank in (request.rank, request.expert_rank))
    )
    slot = FP32 * (stored.dense_size + most_experts * stored.expert_size)
    slab = add("device", "slab: weights and gradients", 2 * slot * request.slots, "B")
    slab_moments = add("device", "slab: moments", 2 * slot * request.slots, "B")
    left = device.memory_bytes * 0.95 - base_bytes - dense_bytes - slab - slab_moments
    row_bytes = _activations_per_row(dims)
    add("device", "activations per row", row_bytes, "B")
    cache_row = BF16 * dims.num_layers * _cache_width(dims)
    cache = sequences * (request.prompt_tokens + request.completion_tokens) * cache_row
    add("device", "KV cache of one user's rollouts", cache, "B")
    room_rows = max(left, 0.0) * request.devices / row_bytes
    adapters = min(request.slots / 2, max(left, 0.0) * request.devices / max(cache, 1.0))
    adapters = float(math.floor(adapters))
    add("device", "free for activations or KV cache", left, "B")
    add("device", "memory", device.memory_bytes, "B", "sheet")
    fits = left > 0 and adapters >= 1 and room_rows >= 1
    add("wave", "adapters per wave", adapters, "adapters")
    rows = add("wave", "rows per wave", adapters * tokens, "rows")
    passes = add(
        "wave", "passes per wave", math.ceil(rows / max(room_rows, 1.0)) if rows else 0, "passes"
    )

    # Time of one wave.
    rate, bandwidth = (
        device.flops * request.efficiency * request.devices,
        device.memory_bandwidth * request.efficiency,
    )
    nodes = math.ceil(request.devices / device.per_node)
    wire = (device.links if nodes == 1 else device.network) * request.efficiency
    add("wave", "efficiency of rates", request.efficiency, "", "assumed")
    away = (request.devices - 1) / request.devices
    layer_row = dims.experts_per_token * _hidden(dims) * BF16 * away
    add("wave", "bytes on the wire per layer and row, there and back", 2 * layer_row, "B")
    # A pass of the base alone for its log-probabilities, then forward and backward (a frozen base:
    # dX only).
    products = add("wave", "training: products", 6 * active * rows / rate, "s")
    streams = add(
        "wave",
        "training: reading weights",
        passes * 3 * (base_bytes + dense_bytes) / bandwidth,
        "s",
    )
    # There and back, three times.
    wires = add(
        "wave",
        "training: exchange",
        6 * layer_row * dims.num_moe_layers * rows / request.devices / wire,
        "s",
    )
    optimizer = add(
        "wave",
        "optimizer on the slab",
        7 * FP32 * stored.size * adapters / request.devices / bandwidth,
        "s",
    )
    decode_rows = adapters * sequences / request.devices
    # Read in a step: the base, the adapters, and on average half of the cache at its fullest.
    adapter_bytes = FP32 * stored.size * adapters / request.devices
    read = base_bytes + dense_bytes + adapter_bytes + cache * adapters / request.devices / 2
    step = max(
        2 * active * adapters * sequences / rate,
        read / bandwidth,
        2 * layer_row * dims.num_moe_layers * decode_rows / wire,
    )
    rollout = add("wave", "rollout", step * request.completion_tokens, "s")
    moved = adapters * (weights + moments + revision)
    loads = add("wave", "paging in and committing", moved / request.store_bandwidth, "s")
    training = max(products, streams, wires) + optimizer
    wave_s = add(
        "wave", "time of a wave (one stage after the other)", training + rollout + loads, "s"
    )

    # The population.
    per_day = request.users * request.updates_per_user_and_day
    add("population", "updates asked for per day", per_day, "", "given")
    waves = request.users / adapters if adapters else math.inf
    add("population", "waves to refresh every user", waves, "waves")
    hours = add("population", "hours to refresh every user", waves * wave_s / 3600, "h")
    able = 24 / hours * request.users if hours and math.isfinite(hours) else 0.0
    add("population", "updates possible per day", able, "")
    add("store", "stored: tips with moments, kept revisions, evidence",
        request.users * (moments + request.kept_revisions * (weights + evidence)), "B")  # fmt: skip
    yearly = per_day * DAYS_PER_YEAR
    add("store", "written per year", yearly * revision, "B")
    waves_per_year = yearly / adapters if adapters else math.inf
    # Attempt, pack and wave record of each partition that a wave touches.
    touched = min(request.partitions, adapters)
    add("store", "PUT requests per year, waves", waves_per_year * 3 * touched, "requests")
    signs = request.partitions * DAYS_PER_YEAR * 86_400 / HEARTBEAT_S
    add("store", "PUT requests per year, signs of life", signs, "requests")
    add("store", "GET requests per year (all adapters cold)", yearly * 2, "requests")
    costs = {
        "training: products": products,
        "training: reading weights": streams,
        "training: exchange": wires,
        "optimizer on the slab": optimizer,
        "rollout": rollout,
        "paging in and committing": loads,
    }
    bottleneck, knob = _bottleneck(
        fits, base_bytes + dense_bytes, slab + slab_moments, device, costs
    )
    return Plan(lines=tuple(lines), fits=fits, bottleneck=bottleneck, knob=knob)


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


_KNOBS = {
    "training: products": "more devices; fewer or shorter samples per event",
    "training: reading weights": "more adapters per wave: raise slots or lower expert_rank so that they fit",
    "training: exchange": "devices of one node per group; faster links between nodes",
    "optimizer on the slab": "lower expert_rank, which most of an adapter's parameters depend on",
    "rollout": "more adapters per wave share every read of the base; shorter completions; logged experience instead",
    "paging in and committing": "lower rank or expert_rank; a faster object store; adapters that stay hot",
}


def _bottleneck(
    fits: bool, base: float, slab: float, device: Device, costs: Mapping[str, float]
) -> tuple[str, str]:
    if base > device.memory_bytes * 0.95:
        return (
            "the base does not fit",
            "more devices: experts are split over all of them; the dense part is not",
        )
    if not fits:
        over = (
            f"base and slab need {(base + slab) / 1e9:,.0f} GB of {device.memory_bytes / 1e9:,.0f}"
        )
        return f"no room for a wave ({over})", "fewer slots, lower expert_rank, or more devices"
    worst = max(costs, key=lambda name: costs[name])
    return worst, _KNOBS[worst]


def readable(value: float, unit: str) -> str:
    """With a prefix that leaves three digits."""
    if not math.isfinite(value):
        return "-"
    if unit == "s":
        return f"{value:,.3g} s"
    for factor, prefix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{'' if unit == 'B' else ' '}{unit}".rstrip()
    return f"{value:,.3g} {unit}".rstrip()
