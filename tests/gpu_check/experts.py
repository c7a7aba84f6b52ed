"""LoRA on attention and on every expert, at half of the layers: it fits beside 64 users."""

from __future__ import annotations

import torch

from tests.gpu_check.check import Check
from tests.gpu_check.large import EVERYTHING, close_bench, open_bench, step


def experts(check: Check) -> None:
    users = 2 if check.dry else 64
    with check.device():
        preset = "random:tiny:1" if check.dry else "random:qwen3-30b-a3b:24"
        close_bench()
        own = open_bench(check, preset, EVERYTHING, users)
        rate = 1.0 if check.dry else 800e12
        step(check, own, users, 4 if check.dry else 64, rate)
        check.say(f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB held at most")
