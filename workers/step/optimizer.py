"""AdamW over slots: each adapter's own learning rates, step, clipping and activity.

Whether an adapter is updated, and how far its gradient is clipped, is decided before anything is
written. What an adapter gets depends on its own row alone: sums run in fixed blocks, in layout
order.

Suffixes: E experts, B blocks, P elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from populace.configs.schema import OptimizerSettings
from populace.kernels.grouped import padded_rank
from populace.storage.errors import PopulaceError
from populace.workers.adapters.slab import GRADS, MOMENTS, WEIGHTS, Slab, Slot
from populace.workers.batch import AdapterKey
from populace.workers.device import Device
from populace.workers.layout import AdapterLayout, layout_of, pad_ranks
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
    norms, updates = {}, []
    squares_A1E = torch.zeros(len(keys), 1 + slab.dims.num_experts, dtype=torch.float64)
    for number, squares in enumerate(part_squares(slab, [slab.trained(key) for key in keys])):
        for part, square in squares.items():
            squares_A1E[number, 1 + part] = square
    # Every part lies on one shard, so this sum is exact.
    for key, squares_E1 in zip(keys, exchange.all_reduce(squares_A1E).tolist(), strict=True):
        slot = slab.trained(key)
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
        updates += [
            _Update(pieces=pieces, step=slot.state.step, rate=rate, scale=scale)
            for rate, pieces in _pieces(slab, slot)
        ]
    (_cpu_adam if settings.offload else _fused_adamw)(updates, settings, slab.device)
    return norms


def part_squares(slab: Slab, slots: Sequence[Slot]) -> list[dict[int, float]]:
    """Sums of squares of what this shard has of each adapter's gradient: the dense part's under -1,
    each expert's under its number. On a device the host waits once for all of them: it decides who
    is updated."""
    names, norms = [], []
    for slot in slots:
        parts = list(_grad_parts(slab, slot))
        names.append([own for own, _ in parts])
        norms += [_block_norms(part_EP) for _, part_EP in parts]
    blocks = iter(slab.device.download(*norms).arrays())
    return [
        {
            part: math.fsum(row)
            for own in parts
            for part, row in zip(own, np.square(next(blocks), dtype=np.float64), strict=True)
        }
        for parts in names
    ]


def _grad_parts(slab: Slab, slot: Slot) -> Iterator[tuple[list[int], Tensor]]:
    """(names, [names, P]) of the experts' parts of a gradient, and of the dense part."""
    exact, experts = slab.memory.layout(slot.address), slab.shard.experts
    layout, grad_P = exact, slab.memory.part(slot.address, GRADS)
    if not slab.device.is_cuda:
        # Blocks are of ranks as products take them: the order of additions that replays count on.
        ranks = (padded_rank(rank, slab.device.dtype) for rank in (exact.rank, exact.expert_rank))
        layout = layout_of(slab.own_dims, *ranks)
        grad_P = pad_ranks(grad_P, exact, layout)
    dense = layout.dense_size
    yield list(experts), grad_P[dense:].view(len(experts), layout.expert_size)
    if slab.shard.is_home(slot.address):
        yield [-1], grad_P[:dense].unsqueeze(0)


def _block_norms(part_EP: Tensor) -> Tensor:
    """[E, B] norms of blocks."""
    whole = part_EP.shape[1] // BLOCK * BLOCK
    norms = [torch.linalg.vector_norm(part_EP[:, whole:], dim=1, keepdim=True)]
    if whole:
        blocks_EBP = part_EP[:, :whole].view(len(part_EP), -1, BLOCK)
        norms.insert(0, torch.linalg.vector_norm(blocks_EBP, dim=2))
    return torch.cat(norms, 1)


Pieces = list[tuple[Tensor, Tensor, Tensor, Tensor]]
"""(weights, gradient, m, v) of parts of an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """What is moved at one learning rate."""

    pieces: Pieces
    step: int
    rate: float
    scale: float
    """What the gradient is multiplied by."""


def _pieces(slab: Slab, slot: Slot) -> list[tuple[float, Pieces]]:
    """What this step moves, by learning rate. Where A and B have the same, few large pieces instead
    of hundreds."""
    spec, layout = slot.spec, slab.memory.layout(slot.address)
    flats = [slab.memory.part(slot.address, name) for name in (WEIGHTS, GRADS, *MOMENTS)]
    own = slab.shard.experts
    places = tuple(expert - own.start for expert in sorted(slot.state.experts) if expert in own)
    is_home = slab.shard.is_home(slot.address)
    ranges = _ranges(layout, places, is_home, spec.b_learning_rate_ratio != 1.0)
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


def _fused_adamw(updates: Sequence[_Update], settings: OptimizerSettings, device: Device) -> None:
    """AdamW (https://arxiv.org/abs/1711.05101) by torch's fused kernel, which corrects the bias in
    fp64."""
    numbers = torch.tensor([[float(own.step), 1 / own.scale] for own in updates])
    (there_U2,) = device.upload(numbers)
    for own, (step, inverse) in zip(updates, there_U2.unbind(0), strict=True):
        weights, grads, m, v = (list(column) for column in zip(*own.pieces, strict=True))
        torch._fused_adamw_(
            weights,
            grads,
            m,
            v,
            [],
            [step] * len(own.pieces),
            lr=own.rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
            eps=settings.epsilon,
            amsgrad=False,
            maximize=False,
            grad_scale=None if own.scale == 1.0 else inverse,
        )


def _cpu_adam(updates: Sequence[_Update], settings: OptimizerSettings, device: Device) -> None:
    """AdamW by DeepSpeed's CPUAdam, on host memory. Its own bias correction depends on the
    history of its calls: it is off, and the correction moves into rate and epsilon,

        m̂ / (√v̂ + ε) = (√c₂ / c₁) · m / (√v + ε √c₂),    cᵢ = 1 - βᵢ^step.
    """
    for own in updates:
        root = math.sqrt(1 - settings.beta2**own.step)
        corrected = own.rate * root / (1 - settings.beta1**own.step)
        for weights, grads, m, v in own.pieces:
            _cpu_adam_library().adam_update(
                0,
                own.step,
                corrected,
                settings.beta1,
                settings.beta2,
                settings.epsilon * root,
                settings.weight_decay * own.rate / corrected,
                False,
                weights,
                grads * own.scale,
                m,
                v,
            )


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
