"""How two revisions of an adapter differ, module by module.

Suffixes: E experts, R rank, D in, F out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from populace.population.client import Population
from populace.population.sampler import base_of
from populace.population.tools.peft import load_weights
from populace.workers.base.families import dims_of
from populace.workers.layout import AdapterLayout, layout_of
from populace.workers.shapes import EXPERT_MODULES, AdapterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleNorms:
    """Frobenius norms of what an adapter adds to one kind of module, s · B A, over all layers and
    experts."""

    module: str
    before: float
    after: float
    change: float
    """Norm of the difference of the two."""


def diff_revisions(population: Population, user: str, before: int, after: int) -> list[ModuleNorms]:
    """Norms per module of two revisions and of their difference. `InvalidInput` for a revision that
    isn't kept."""
    population.ledger.follow()
    spec = AdapterSpec.from_dict(population.ledger.adapter(user).spec)
    base = base_of(population.meta, population.settings)
    layout = layout_of(dims_of(Path(base.folder)), *spec.ranks)
    return norms_of(
        layout,
        spec,
        *(load_weights(population, layout, user, number) for number in (before, after)),
    )


def norms_of(
    layout: AdapterLayout, spec: AdapterSpec, before_P: Tensor, after_P: Tensor
) -> list[ModuleNorms]:
    """`diff_revisions` of two adapters in exact layout."""
    found = []
    for module, _, _ in layout.dims.shapes:
        if not spec.rank_of(module):
            continue
        first = layout.dims.num_dense_layers if module in EXPERT_MODULES else 0
        squares = torch.zeros(3, dtype=torch.float64)
        for layer in range(first, layout.dims.num_layers):
            (a, b), (c, d) = (
                [layout.view(flat, module, layer, which).double() for which in "ab"]
                for flat in (before_P, after_P)
            )
            pairs = [(b, a), (d, c), (torch.cat([d, -b], -1), torch.cat([c, a], -2))]
            squares += torch.stack([_square_of_product(left, right) for left, right in pairs])
        before, after, change = (spec.scale_of(module) * squares.sqrt()).tolist()
        found.append(ModuleNorms(module=module, before=before, after=after, change=change))
    return found


def _square_of_product(b_FR: Tensor, a_RD: Tensor) -> Tensor:
    """‖B A‖² without B A: tr(BᵀB · AAᵀ). Rounding can take it below zero."""
    return ((b_FR.mT @ b_FR) * (a_RD @ a_RD.mT)).sum().clamp(min=0)


def largest(norms: Sequence[ModuleNorms]) -> float:
    """What bars are drawn against."""
    return max((max(item.before, item.after, item.change) for item in norms), default=0.0) or 1.0
