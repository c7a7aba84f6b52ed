"""What an adapter is made of, and the shapes of a base that adapters depend on. Free of torch.

Suffixes: D in, F out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

EXPERT_MODULES = ("gate_proj", "up_proj", "down_proj")


def ranks_of(targets: str, rank: int, expert_rank: int) -> tuple[int, int]:
    """(on attention, on every expert), 0 for what `targets` leave out."""
    return (0 if targets == "experts" else rank, 0 if targets == "attention" else expert_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """What an adapter is made of; fixed when it is created."""

    rank: int
    expert_rank: int
    alpha: float
    learning_rate: float
    b_learning_rate_ratio: float = 1.0
    targets: str = "both"
    """`attention`, `experts` or `both`: which modules carry LoRA. Specs that were written before
    there was a choice name none, and mean both."""

    @property
    def ranks(self) -> tuple[int, int]:
        """(on attention, on every expert), 0 where the adapter has nothing: what its layout follows
        from."""
        return ranks_of(self.targets, self.rank, self.expert_rank)

    def rank_of(self, module: str) -> int:
        return self.ranks[module in EXPERT_MODULES]

    def scale_of(self, module: str) -> float:
        """s = alpha / r; 0 for a module that the adapter leaves alone."""
        return self.alpha / self.rank_of(module) if self.rank_of(module) else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(body: Mapping[str, Any]) -> AdapterSpec:
        return AdapterSpec(**body)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDims:
    """The shapes of a base that adapters depend on."""

    num_layers: int
    num_dense_layers: int = 0
    """Leading layers without experts."""
    num_experts: int
    experts_per_token: int
    shapes: tuple[tuple[str, int, int], ...]
    """(module, F, D) for every module that carries LoRA."""

    @property
    def dense_modules(self) -> tuple[str, ...]:
        return tuple(module for module, _, _ in self.shapes if module not in EXPERT_MODULES)

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers
