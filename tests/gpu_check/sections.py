"""The sections, in their order: what is right first, then what it costs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from tests.gpu_check.check import Check


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the check.

    Example: `Section(name="bits", stage="small", module="small", limit_s=40, tells="bits")`."""

    name: str
    stage: str
    """Sections of one stage share a process, and what they load."""
    module: str
    """That has a function of this name."""
    limit_s: float
    """That it may take at most in a run of six minutes; more or less in longer or shorter ones."""
    tells: str

    @property
    def run(self) -> Callable[[Check], None]:
        module = importlib.import_module(f"tests.gpu_check.{self.module}")
        found: Callable[[Check], None] = getattr(module, self.name)
        return found


_TABLE = (
    # name, stage, module, seconds at most, what it tells
    ("machine", "first", "machine", 30, "versions, copy, product"),
    ("kernels", "first", "kernels", 60, "Triton's kernels against fp64"),
    ("parity", "small", "small", 50, "a CPU's numbers on four families"),
    ("bits", "small", "small", 40, "a user's bits, alone and with mates"),
    ("path", "small", "small", 40, "enqueue, commit, verify, replay"),
    ("actors", "actors", "actors", 75, "a run on Ray actors, killed once"),
    ("base", "large", "large", 45, "a base of real size, and its memory"),
    ("waves", "large", "large", 60, "fused steps"),
    ("decode", "large", "large", 40, "rollouts"),
    ("peft", "large", "large", 50, "PEFT and generate, same tensors"),
    ("paging", "large", "large", 30, "adapters in and out"),
    ("experts", "large", "experts", 50, "LoRA on every expert, 24 layers"),
)

SECTIONS = tuple(
    Section(name=name, stage=stage, module=module, limit_s=limit_s, tells=tells)
    for name, stage, module, limit_s, tells in _TABLE
)
