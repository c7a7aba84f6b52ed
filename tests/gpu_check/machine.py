"""What the machine is, and the two ceilings that figures are held against."""

from __future__ import annotations

import shutil
import subprocess

import torch

from populace.population.tools.doctor import machine as of_machine
from populace.population.tools.doctor import packages
from populace.workers.cards import cuda_problem
from tests.gpu_check.check import Check

QUERY = "name,memory.total,clocks.sm,clocks.max.sm,power.draw,temperature.gpu,pstate"


def machine(check: Check) -> None:
    for finding in (*of_machine(), *packages()):
        check.say(f"{finding.name}: {finding.text}")
    with check.device():
        if problem := cuda_problem():
            check.require(False, problem)
            return
        if (smi := shutil.which("nvidia-smi")) is not None:
            query = [smi, f"--query-gpu={QUERY}", "--format=csv,noheader"]
            done = subprocess.run(query, capture_output=True, text=True, timeout=20)
            check.say(f"nvidia-smi {QUERY}: {done.stdout.strip() or done.stderr.strip()}")
        copies(check)
        check.figure("bf16 product, 8192³", products(check), "TFLOP/s")


def copies(check: Check) -> None:
    """Device to device, and over the bus to pinned memory and back."""
    size = 1 << 10 if check.dry else 4 << 30
    source, target = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    seconds = check.seconds_of(lambda: target.copy_(source))
    check.figure(
        "copy on the device, read and written", [2 * size / s / 1e12 for s in seconds], "TB/s"
    )
    part = size // 4
    host = torch.zeros(part, dtype=torch.uint8, pin_memory=True)
    seconds = check.seconds_of(lambda: target[:part].copy_(host, non_blocking=True))
    check.figure("pinned memory to the device", [part / s / 1e9 for s in seconds], "GB/s")
    seconds = check.seconds_of(lambda: host.copy_(target[:part], non_blocking=True))
    check.figure("the device to pinned memory", [part / s / 1e9 for s in seconds], "GB/s")


def products(check: Check) -> list[float]:
    """TFLOP/s of a bf16 product of random data, ten at a time."""
    size, times = (64, 1) if check.dry else (8192, 10)
    generator = torch.Generator("cuda")
    left, right, out = (
        torch.empty(size, size, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
        for _ in range(3)
    )

    def multiply() -> None:
        for _ in range(times):
            torch.mm(left, right, out=out)

    return [times * 2 * size**3 / s / 1e12 for s in check.seconds_of(multiply)]
