"""AdamW over slots: each adapter's own learning rates, step, clipping and activity.

Whether an adapter is updated, and how far its gradient is clipped, is decided before anything is
written. What an adapter gets depends on its own row alone: sums run in fixed blocks, in layout
order.

Suffixes: E experts, B blocks, P elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from populace.configs.schema import OptimizerSettings
from populace.storage.errors import PopulaceError
from populace.workers.adapters.slab import Slab, Slot
from populace.workers.batch import AdapterKey
from populace.workers.layout import AdapterLayout
from populace.workers.shards.exchange import ALONE, Exchange

BLOCK = 4096
"""Elements per partial sum: short enough that one thread adds it, whatever the number of
threads."""


def optimizer_name(settings: OptimizerSettings) -> str:
    """In the numerics fingerprint."""
    return f"deepspeed-{version('deepspeed')}-cpuadam" if settings.offload else "slab-adamw"


def update_adapters(
    slab: Slab, keys: Sequence[AdapterKey], settings: OptimizerSettings, exchange: Exchange = ALONE
) -> dict[AdapterKey, float]:
    """Clip and step every adapter whose gradient is finite, in place; returns all gradient norms. A
    norm that is not finite means that its adapter was left as it was, on every shard."""
    norms = {}
    apply = _cpu_adam if settings.offload else _fused_adamw
    squares_A1E = torch.zeros(len(keys), 1 + slab.dims.num_experts, dtype=torch.float64)
    for number, key in enumerate(keys):
        for part, square in part_squares(slab, slab.slots[key]).items():
            squares_A1E[number, 1 + part] = square
    # Every part lies on one shard, so this sum is exact.
    for key, squares_E1 in zip(keys, exchange.all_reduce(squares_A1E).tolist(), strict=True):
        slot = slab.slots[key]
        norm = norms[key] = (
            math.sqrt(math.fsum(squares_E1)) if all(map(math.isfinite, squares_E1)) else math.nan
        )
        if math.isnan(norm):
            continue
        slot.state.step += 1
        # Experts that no token ever reached are left out: they stay as initialised, weight decay
        # included.
        reached = {expert for expert, square in enumerate(squares_E1[1:]) if square > 0}
        slot.state.experts |= reached
        scale = min(1.0, settings.max_grad_norm / (norm + 1e-12))
        for rate, pieces in _pieces(slab, slot):
            apply(pieces, slot.state.step, rate, scale, settings)
    return norms


def part_squares(slab: Slab, slot: Slot) -> dict[int, float]:
    """Sums of squares of what this shard has of an adapter's gradient: the dense part's under -1,
    each expert's under its number."""
    arena = slab.arenas[slot.address.arena]
    grad_P, dense = arena.grads[slot.address.row], arena.layout.dense_size
    parts = [(list(slab.shard.experts), grad_P[dense:].view(len(slab.shard.experts), -1))]
    if slab.shard.is_home(slot.address):
        parts.append(([-1], grad_P[:dense].unsqueeze(0)))
    squares: dict[int, float] = {}
    for names, part_EP in parts:
        whole = part_EP.shape[1] // BLOCK * BLOCK
        norms = (
            [torch.linalg.vector_norm(part_EP[:, :whole].view(len(part_EP), -1, BLOCK), dim=2)]
            if whole
            else []
        )
        norms.append(torch.linalg.vector_norm(part_EP[:, whole:], dim=1, keepdim=True))
        sums = [math.fsum(row) for row in torch.cat(norms, 1).double().square().tolist()]
        squares |= dict(zip(names, sums, strict=True))
    return squares


Pieces = list[tuple[Tensor, Tensor, Tensor, Tensor]]
"""(weights, gradient, m, v) of parts of an adapter."""


def _pieces(slab: Slab, slot: Slot) -> list[tuple[float, Pieces]]:
    """What this step moves, by learning rate. Where A and B have the same, few large pieces instead
    of hundreds."""
    arena, spec = slab.arenas[slot.address.arena], slot.spec
    flats = (
        arena.weights[slot.address.row],
        arena.grads[slot.address.row],
        arena.m[slot.address.row],
        arena.v[slot.address.row],
    )
    own = slab.shard.experts
    places = tuple(expert - own.start for expert in sorted(slot.state.experts) if expert in own)
    is_home = slab.shard.is_home(slot.address)
    ranges = _ranges(arena.layout, places, is_home, spec.b_learning_rate_ratio != 1.0)
    rates = {"a": spec.learning_rate, "b": spec.learning_rate * spec.b_learning_rate_ratio}
    return [
        (
            rates[which],
            [(flats[0][s:e], flats[1][s:e], flats[2][s:e], flats[3][s:e]) for s, e in bounds],
        )
        for which, bounds in ranges.items()
        if bounds
    ]


@functools.lru_cache(maxsize=4096)
def _ranges(
    layout: AdapterLayout, experts: tuple[int, ...], dense: bool, apart: bool
) -> dict[str, list[tuple[int, int]]]:
    """Ranges of the flat buffer by `a` and `b`; all under `a` unless they are wanted apart.
    `experts` by their place in the layout."""
    parts = [(0, layout.dense)] if dense else []
    parts += [(layout.expert_range(expert)[0], layout.expert) for expert in experts]
    found: dict[str, list[tuple[int, int]]] = {"a": []}
    for base, places in parts:
        for place in places.values():
            own = found.setdefault(place.which if apart else "a", [])
            start = base + place.offset
            if own and own[-1][1] == start:
                start = own.pop()[0]
            own.append((start, base + place.offset + math.prod(place.shape)))
    return found


def _fused_adamw(
    pieces: Pieces, step: int, rate: float, scale: float, settings: OptimizerSettings
) -> None:
    """AdamW (https://arxiv.org/abs/1711.05101) by torch's fused kernel, which corrects the bias in
    fp64."""
    weights, grads, m, v = (list(column) for column in zip(*pieces, strict=True))
    torch._fused_adamw_(
        weights,
        grads,
        m,
        v,
        [],
        [torch.tensor(float(step))] * len(pieces),
        lr=rate,
        beta1=settings.beta1,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        eps=settings.epsilon,
        amsgrad=False,
        maximize=False,
        grad_scale=None if scale == 1.0 else torch.tensor(1 / scale),
    )


def _cpu_adam(
    pieces: Pieces, step: int, rate: float, scale: float, settings: OptimizerSettings
) -> None:
    """AdamW by DeepSpeed's CPUAdam, on host memory. Its own bias correction depends on the
    history of its calls: it is off, and the correction moves into rate and epsilon,

        m̂ / (√v̂ + ε) = (√c₂ / c₁) · m / (√v + ε √c₂),    cᵢ = 1 - βᵢ^step.
    """
    root = math.sqrt(1 - settings.beta2**step)
    corrected = rate * root / (1 - settings.beta1**step)
    for weights, grads, m, v in pieces:
        host, gradient = weights.cpu(), grads.cpu() * scale
        _cpu_adam_library().adam_update(
            0,
            step,
            corrected,
            settings.beta1,
            settings.beta2,
            settings.epsilon * root,
            settings.weight_decay * rate / corrected,
            False,
            host,
            gradient,
            m,
            v,
        )
        if host is not weights:
            weights.copy_(host)


@functools.cache
def _cpu_adam_library() -> Any:
    """DeepSpeed's extension; the first use compiles it, which takes minutes once and needs g++ and
    ninja."""
    try:
        from deepspeed.ops.op_builder import CPUAdamBuilder

        load: Callable[..., Any] = CPUAdamBuilder().load
        library = load(verbose=False)
    except Exception as error:  # the builder raises whatever the compiler or the loader does
        raise PopulaceError(
            f"optimizer.offload needs DeepSpeed's CPUAdam, which can't be loaded ({error}); "
            "install it with "
            "`pip install deepspeed ninja --no-build-isolation` beside g++, or set "
            "optimizer.offload=false"
        ) from error
    library.create_adam(0, 1e-3, 0.9, 0.99, 1e-8, 0.0, True, False)
    return library
