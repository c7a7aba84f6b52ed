"""Accelerators by their data sheets, and what a capacity plan is asked about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from populace.configs.schema import TARGETS
from populace.storage.errors import InvalidInput
from populace.workers.shapes import ranks_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a shard computes on. An accelerator from its data sheet: dense bf16 rate, memory, wires
    per direction."""

    flops: float
    memory_bytes: float
    memory_bandwidth: float
    """Bytes per second."""
    links: float
    """Bytes per second to the other devices of its node."""
    network: float
    """Bytes per second to other nodes."""
    per_node: int
    kind: str = "cuda"
    weight_bytes: int = 2
    """Of an element of the base."""


DEVICES: Mapping[str, Device] = {
    # Two cores of a server CPU with 24 GB, in fp32; measured where this project is tested.
    "cpu": Device(
        flops=0.2e12,
        memory_bytes=24e9,
        memory_bandwidth=20e9,
        links=2e9,
        network=1e9,
        per_node=1,
        kind="cpu",
        weight_bytes=4,
    ),
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
    targets: str
    """`both`, `attention` or `experts`; see `adapter.targets` in configs/schema.py."""
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

    @property
    def ranks(self) -> tuple[int, int]:
        """On attention and on experts, 0 where adapters have nothing."""
        return ranks_of(self.targets, self.rank, self.expert_rank)


def check(request: Request) -> None:
    """`InvalidInput` names the field, the value and the way out."""
    if request.device not in DEVICES:
        raise InvalidInput(f"device is {request.device!r}; use one of {', '.join(DEVICES)}")
    if request.targets not in TARGETS:
        raise InvalidInput(f"targets is {request.targets!r}; use one of {', '.join(TARGETS)}")
    for name in Request.__dataclass_fields__:
        value = getattr(request, name)
        unused = {"attention": "expert_rank", "experts": "rank"}.get(request.targets)
        if name not in ("device", "targets", unused) and not value > 0:
            raise InvalidInput(f"{name.replace('_', '-')} is {value}; use a number above zero")
    if request.efficiency > 1:
        raise InvalidInput(f"efficiency is {request.efficiency}; use a share of at most 1")
