"""What a shard computes on, and how bytes get there and back: a CPU, or one CUDA device.

Nobody else names a device or moves a tensor. What depends on a batch alone is planned on the host
and uploaded once per pass; what is read back comes over a stream of its own and is waited for when
it is looked at.

    upload     host records -> the same records there, in one copy
    fill       host memory  -> a part of a tensor that is there
    download   tensors there -> host memory, behind what was asked so far
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from populace.storage.errors import InvalidInput
from populace.workers.cards import cuda_problem

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]

_ALIGNMENT = 16
"""Bytes; Triton would compile its kernels anew for a tensor that begins elsewhere."""


class Download:
    """Tensors on their way to the host, or there."""

    def __init__(self, hosts: Sequence[Tensor], arrived: Any = None) -> None:
        self._hosts, self._arrived = hosts, arrived

    def tensors(self) -> Sequence[Tensor]:
        """They, on the host, once they have arrived; on a CPU, themselves."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._hosts

    def arrays(self) -> list[Array]:
        """NumPy arrays of them, once they have arrived. On a CPU they share the tensors' memory."""
        return [host.numpy() for host in self.tensors()]


class Device:
    """A CPU: what is here is on the host already."""

    kind = "cpu"
    backend = "grouped"
    """Of `kernels.lora.BACKENDS`, what computes fastest here."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        """Of the base; adapters are fp32."""
        self._torch = torch.device(self.kind)

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    has_grouped_product = True
    """Whether torch's grouped product runs here without asking the host."""

    def fingerprint(self) -> dict[str, str]:
        """What bits depend on besides versions: of the numerics fingerprint."""
        return {"device": self.kind, "cpu": torch.backends.cpu.get_cpu_capability()}

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self._torch)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self._torch)

    def place(self, host: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of a tensor of the host; waits for it."""
        return host.to(self._torch, dtype or host.dtype, copy=True)

    def draw_normal(self, target: Tensor, seed: int, std: float) -> None:
        """Fill a tensor that is here with normal values of a seed; which, depends on the device."""
        generator = torch.Generator(self._torch)
        target.normal_(0.0, std, generator=generator.manual_seed(seed))

    def upload(self, *records: Any) -> tuple[Any, ...]:
        """Dataclasses, tuples of them, or tensors, with all their tensors here. Uses those of the
        host where it is one."""
        return records

    def fill(self, target_P: Tensor, host_P: Tensor) -> None:
        """Copy fp32 values of the host into a tensor that is here."""
        target_P.copy_(host_P)

    def download(self, *tensors: Tensor) -> Download:
        """Start to copy tensors to the host."""
        return Download(tensors)


class Cuda(Device):
    """One GPU: the current CUDA device of this process."""

    kind = "cuda"
    backend = "triton"

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._out = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        """What is downloaded goes beside the stream that computes."""
        # Elsewhere torch multiplies expert by expert, and asks for their ends (GroupedBlas.cpp).
        card = torch.cuda.get_device_properties()
        self.has_grouped_product = dtype is torch.bfloat16 and card.major in (9, 10)

    def fingerprint(self) -> dict[str, str]:
        card = torch.cuda.get_device_properties()
        return {
            "device": self.kind,
            "gpu": card.name,
            "compute_capability": f"{card.major}.{card.minor}",
            "cuda": str(torch.version.cuda),
            "driver": str(_driver_version()),
            "cublas": _cublas_version(),
        }

    def free_bytes(self) -> int:
        """Memory of the card that nobody uses."""
        free, _ = torch.cuda.mem_get_info()
        return int(free)

    def upload(self, *records: Any) -> tuple[Any, ...]:
        tensors = [tensor for record in records for tensor in _tensors_of(record)]
        sizes = [tensor.nbytes for tensor in tensors]
        starts = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]).tolist()
        host_P = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
        for tensor, start, size in zip(tensors, starts, sizes, strict=False):
            host_P[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        there_P = self.empty(starts[-1], dtype=torch.uint8)
        there_P.copy_(host_P, non_blocking=True)
        moved = (
            there_P[start : start + size].view(tensor.dtype).view(tensor.shape)
            for tensor, start, size in zip(tensors, starts, sizes, strict=False)
        )
        return tuple(_with_tensors(record, moved) for record in records)

    def fill(self, target_P: Tensor, host_P: Tensor) -> None:
        target_P.copy_(host_P.pin_memory(), non_blocking=True)

    def download(self, *tensors: Tensor) -> Download:
        hosts = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors
        ]
        self._out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._out):
            for host, tensor in zip(hosts, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
                # Its memory goes to nobody else before this copy is done.
                tensor.record_stream(self._out)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._out)
        return Download(hosts, arrived)


def device_of(device: str, dtype: str) -> Device:
    """What `base.device` and `base.dtype` ask for, `auto` decided by what is here. `InvalidInput`
    where there is no such device."""
    problem = "" if device == "cpu" else cuda_problem()
    if device == "cuda" and problem:
        raise InvalidInput(f"base.device is 'cuda', but {problem}; or use base.device=cpu")
    if device != "cpu" and not problem:
        return Cuda(_DTYPES.get(dtype, torch.bfloat16))
    # bfloat16 where the CPU multiplies it natively; elsewhere it is emulated, at an eighth of the
    # speed of fp32 forward and less than a hundredth backward (docs/decisions/0001).
    native = any(
        bool(torch.cpu.get_capabilities().get(flag))
        for flag in ("avx512_bf16", "amx_bf16", "arm_bf16")
    )
    return Device(_DTYPES.get(dtype, torch.bfloat16 if native else torch.float32))


_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _driver_version() -> int:
    """The newest CUDA that the driver knows, as CUDA writes it: 13010 is 13.1."""
    return int(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]


def _cublas_version() -> str:
    for package in ("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _tensors_of(record: Any) -> Iterator[Tensor]:
    """A record's tensors, in the order in which `_with_tensors` puts others in their places."""
    if isinstance(record, Tensor):
        yield record
    elif isinstance(record, tuple):
        for item in record:
            yield from _tensors_of(item)
    elif dataclasses.is_dataclass(record):
        for field in dataclasses.fields(record):
            yield from _tensors_of(getattr(record, field.name))


def _with_tensors(record: Any, moved: Iterator[Tensor]) -> Any:
    if isinstance(record, Tensor):
        return next(moved)
    if isinstance(record, tuple) and record and not isinstance(record[0], int):
        return tuple(_with_tensors(item, moved) for item in record)
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        values = {
            field.name: _with_tensors(getattr(record, field.name), moved)
            for field in dataclasses.fields(record)
        }
        return dataclasses.replace(record, **values)
    return record
