"""Capacity planning: what a population costs on given devices, before anybody pays for them.

Arithmetic over a base's shapes and a device's data sheet (`roofline.py`). Every line says where it
comes from: `sheet` (the vendor's data sheet), `given` (asked for), `derived` (follows from the
others) or `assumed`. Nothing here is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from populace.population.ledger.heartbeat import HEARTBEAT_S
from populace.population.tools.devices import DEVICES, Device, Request, check
from populace.population.tools.roofline import (
    Adapter,
    Line,
    Room,
    Sheet,
    Times,
    adapter_of,
    base_of,
    room_of,
    times_of,
)
from populace.storage.errors import InvalidInput
from populace.workers.memory import RESERVE
from populace.workers.shapes import BaseDims

DAYS_PER_YEAR = 365.25


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


def plan(dims: BaseDims, tensors: Mapping[str, int], request: Request) -> Plan:
    """What `request` needs. `tensors`: name on disk -> elements, of the whole base."""
    check(request)
    if not 0 < request.devices <= dims.num_experts:
        raise InvalidInput(
            f"devices is {request.devices}; this base has {dims.num_experts} experts, use 1 to "
            f"{dims.num_experts}"
        )
    device, sheet = DEVICES[request.device], Sheet()
    base = base_of(sheet, dims, tensors, request, device)
    adapter = adapter_of(sheet, dims, request)
    room = room_of(sheet, dims, request, device, base, adapter)
    times = times_of(sheet, dims, request, device, base, adapter, room)
    _population(sheet, request, adapter, room, times)
    bottleneck, knob = _bottleneck(room, base.device_bytes, device, times.stages)
    fits = not room.problem
    return Plan(lines=tuple(sheet.lines), fits=fits, bottleneck=bottleneck, knob=knob)


def _population(sheet: Sheet, request: Request, adapter: Adapter, room: Room, times: Times) -> None:
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


_KNOBS = {
    "training: products": "more devices; fewer or shorter samples per event",
    "training: reading weights": (
        "more adapters per wave: raise slots, or lower ranks so that they fit"
    ),
    "training: exchange": "devices of one node per group; faster links between nodes",
    "optimizer on the slab": "lower ranks, or targets that have less",
    "rollout": (
        "more adapters per wave share every read of the base; shorter completions; logged "
        "experience instead"
    ),
    "paging in and committing": "lower ranks; a faster object store; adapters that stay hot",
}


def _bottleneck(
    room: Room, base: float, device: Device, costs: Mapping[str, float]
) -> tuple[str, str]:
    if base > device.memory_bytes * (1 - RESERVE):
        return (
            "the base does not fit",
            "more devices: experts are split over all of them; the dense part is not",
        )
    if room.problem:
        return room.problem, room.knob
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
