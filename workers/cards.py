"""NVIDIA cards of this machine, and what keeps a shard from computing on one."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

LEAST_CAPABILITY = (8, 0)
"""Compute capability below which kernels are neither compiled nor tried (Ampere: the first with
bfloat16)."""
_DRIVER = Path("/proc/driver/nvidia")
_COMPILERS = ("gcc", "clang")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """What the driver says, whatever torch is installed.

    Example: `Cards(names=("NVIDIA H100 80GB HBM3",), driver="580.159.04")`."""

    names: tuple[str, ...] = ()
    driver: str = ""
    """Its version; empty where no driver is."""


def cards_here() -> Cards:
    """The cards of this machine by its driver's own files, or else by `nvidia-smi`."""
    names = [
        found[1].strip()
        for path in sorted(_DRIVER.glob("gpus/*/information"))
        if (found := re.search(r"Model:(.*)", path.read_text()))
    ]
    version = _DRIVER / "version"
    driver = re.search(r"\d+\.\d+(\.\d+)?", version.read_text()) if version.is_file() else None
    if names and driver is not None:
        return Cards(names=tuple(names), driver=driver[0])
    # In containers that see the device files alone.
    if (smi := shutil.which("nvidia-smi")) is None:
        return Cards(driver="" if driver is None else driver[0])
    query = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return Cards()
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
    return Cards(names=tuple(name for name, _ in rows), driver=rows[0][1].strip() if rows else "")


def cuda_problem() -> str:
    """Why no shard of this process can compute on a CUDA device, and what to change; empty if one
    can."""
    if torch.version.cuda is None:
        return _of_a_cpu_build(cards_here())
    if not torch.cuda.is_available():
        return _without_devices()
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        least, has = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        return (
            f"{torch.cuda.get_device_name()} has compute capability {has}, and our kernels need "
            f"{least}; use an Ampere card or a newer one"
        )
    if compiler() is None:
        return (
            "no C compiler is on the PATH, and Triton compiles the launcher of every kernel; "
            "install gcc, or name a compiler in CC"
        )
    return ""


def compiler() -> str | None:
    """The C compiler that Triton would use; None if there is none."""
    if (named := os.environ.get("CC")) is not None:
        return shutil.which(named)
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


def _of_a_cpu_build(cards: Cards) -> str:
    build = f"torch {torch.__version__} is a build for CPUs"
    if not cards.names:
        return f"this machine shows no NVIDIA card, and {build}"
    return (
        f"{build}, beside {cards.names[0]}; install a CUDA build: `pip uninstall -y torch && pip "
        "install --index-url https://pypi.org/simple -c constraints.txt torch triton`"
    )


def _without_devices() -> str:
    """Of a CUDA build that finds none."""
    build, cards = f"torch {torch.__version__} is a CUDA build", cards_here()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and cards.names:
        return (
            f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides {cards.names[0]}; unset it, or name "
            "the card"
        )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        way_out = (
            "start the container with the NVIDIA runtime (docker run --gpus all)"
            if cards.driver
            else "on a machine with a card install its driver; in a container, start it with "
            "--gpus all"
        )
        return f"{build}, and there is no driver (libcuda.so.1); {way_out}"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return f"{build}, and CUDA doesn't start: {str(error).splitlines()[0]}"
    return f"{build}, and its driver shows no card"
