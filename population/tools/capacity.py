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
    """One figure of a plan.

    Example: `Line(section="device", name="memory", value=8e10, unit="B", source="sheet")`."""

    section: str
    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every figure, whether it fits, and what would limit it."""

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


class _Sheet:
    """The lines of a plan as they are written."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._section = ""

    def begin(self, section: str) -> None:
        """Lines from here on are of this section."""
        self._section = section

    def add(self, name: str, value: float, unit: str, source: str = "derived") -> float:
        self.lines.append(
            Line(section=self._section, name=name, value=value, unit=unit, source=source)
        )
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    dense_bytes: float
    expert_bytes: float
    """Of the device that holds most experts."""
    most_experts: int
    active: float
    """Parameters that a token meets."""

    @property
    def device_bytes(self) -> float:
        return self.dense_bytes + self.expert_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    tokens: float
    """Of an update, prompts once per event."""
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
class _Room:
    """What fits on a device."""

    slab: float
    """Bytes of weights, gradients and moments."""
    cache: float
    """Bytes of keys and values of one user's rollouts."""
    stored_size: int
    """Elements of an adapter as a slab keeps it."""
    adapters: float
    """Of a wave."""
    rows: float
    """Of a pass."""
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    wave_s: float
    stages: Mapping[str, float]
    """What may be the bottleneck -> seconds."""


def plan(dims: BaseDims, tensors: Mapping[str, int], request: Request) -> Plan:
    """What `request` needs. `tensors`: name on disk -> elements, of the whole base in bf16."""
    check(request)
    device, sheet = DEVICES[request.device], _Sheet()
    base = _base(sheet, dims, tensors, request)
    adapter = _adapter(sheet, dims, request)
    room = _room(sheet, dims, request, device, base, adapter)
    times = _times(sheet, dims, request, device, base, adapter, room)
    _population(sheet, request, adapter, room, times)
    bottleneck, knob = _bottleneck(room.fits, base.device_bytes, room.slab, device, times.stages)
    return Plan(lines=tuple(sheet.lines), fits=room.fits, bottleneck=bottleneck, knob=knob)


def _base(sheet: _Sheet, dims: BaseDims, tensors: Mapping[str, int], request: Request) -> _Base:
    sheet.begin("base")
    placement = place_shards(dims.num_experts, request.devices)
    experts = sum(size for name, size in tensors.items() if is_expert(name))
    dense = sum(tensors.values()) - experts
    sheet.add("parameters", sum(tensors.values()), "")
    active = dense + experts * dims.experts_per_token / dims.num_experts
    sheet.add("active parameters per token", active, "")
    most_experts = max(len(shard.experts) for shard in placement.shards)
    return _Base(
        dense_bytes=BF16 * dense,
        expert_bytes=BF16 * experts / dims.num_experts * most_experts,
        most_experts=most_experts,
        active=active,
    )


def _adapter(sheet: _Sheet, dims: BaseDims, request: Request) -> _Adapter:
    sheet.begin("adapter")
    layout = layout_of(dims, request.rank, request.expert_rank)
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
    adapter = _Adapter(
        tokens=tokens, sequences=sequences, weights=weights, moments=moments, evidence=evidence
    )
    sheet.add("bytes per revision", adapter.revision, "B")
    return adapter


def _room(
    sheet: _Sheet,
    dims: BaseDims,
    request: Request,
    device: Device,
    base: _Base,
    adapter: _Adapter,
) -> _Room:
    sheet.begin("device")
    sheet.add("experts of the base (bf16)", base.expert_bytes, "B")
    sheet.add("dense part of the base, replicated (bf16)", base.dense_bytes, "B")
    # A slab pads ranks, keeps room for the dense part on every device, and for its own experts.
    ranks = (stored_rank(rank, torch.bfloat16) for rank in (request.rank, request.expert_rank))
    stored = layout_of(dims, *ranks)
    slot = FP32 * (stored.dense_size + base.most_experts * stored.expert_size)
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
    return _Room(
        slab=slab + slab_moments,
        cache=cache,
        stored_size=stored.size,
        adapters=adapters,
        rows=rows,
        fits=left > 0 and adapters >= 1 and rows >= 1,
    )


def _times(
    sheet: _Sheet,
    dims: BaseDims,
    request: Request,
    device: Device,
    base: _Base,
    adapter: _Adapter,
    room: _Room,
) -> _Times:
    """Of one wave, each stage at its roofline."""
    sheet.begin("wave")
    adapters, devices = room.adapters, request.devices
    sheet.add("adapters per wave", adapters, "adapters")
    rows = sheet.add("rows per wave", adapters * adapter.tokens, "rows")
    num_passes = math.ceil(rows / max(room.rows, 1.0)) if rows else 0
    passes = sheet.add("passes per wave", num_passes, "passes")
    rate = device.flops * request.efficiency * devices
    bandwidth = device.memory_bandwidth * request.efficiency
    nodes = math.ceil(devices / device.per_node)
    wire = (device.links if nodes == 1 else device.network) * request.efficiency
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
    return _Times(
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


def _population(
    sheet: _Sheet, request: Request, adapter: _Adapter, room: _Room, times: _Times
) -> None:
    """What the whole population asks for, and what it writes."""
    sheet.begin("population")
    per_day = request.users * request.updates_per_user_and_day
    sheet.add("updates asked for per day", per_day, "", "given")
    waves = request.users / room.adapters if room.adapters else math.inf
    sheet.add("waves to refresh every user", waves, "waves")
    hours = sheet.add("hours to refresh every user", waves * times.wave_s / 3600, "h")
    able = 24 / hours * request.users if hours and math.isfinite(hours) else 0.0
    sheet.add("updates possible per day", able, "")

    sheet.begin("store")
    kept = request.kept_revisions * (adapter.weights + adapter.evidence)
    stored = request.users * (adapter.moments + kept)
    sheet.add("stored: tips with moments, kept revisions, evidence", stored, "B")
    yearly = per_day * DAYS_PER_YEAR
    sheet.add("written per year", yearly * adapter.revision, "B")
    waves_per_year = yearly / room.adapters if room.adapters else math.inf
    # Attempt, pack and wave record of each partition that a wave touches.
    touched = min(request.partitions, room.adapters)
    sheet.add("PUT requests per year, waves", waves_per_year * 3 * touched, "requests")
    beats = request.partitions * DAYS_PER_YEAR * 86_400 / HEARTBEAT_S
    sheet.add("PUT requests per year, heartbeats", beats, "requests")
    sheet.add("GET requests per year (all adapters cold)", yearly * 2, "requests")


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
