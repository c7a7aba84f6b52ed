"""What makes a user's bits independent of who shares the batch, and the probe that this machine
keeps it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from populace.kernels.lora import FrozenProduct
from populace.workers.adapters.slab import GRADS, Slab
from populace.workers.base.forward import ROW_MULTIPLE, ForwardPass, Kernels
from populace.workers.base.logprobs import token_logprobs
from populace.workers.base.model import BaseModel
from populace.workers.base.rows import SequenceGroup, pack_rows
from populace.workers.batch import AdapterKey
from populace.workers.shapes import AdapterSpec

NUMERICS_REVISION = 2
"""Raised with every change to the order or kind of arithmetic in a step: older revisions can't be
replayed then."""

_COUNTS = (8, 16, 24, 40, 104, 264)


def probe_invariance(base: BaseModel, kernels: Kernels) -> str:
    """What on this machine, at its present number of threads, breaks the promise; empty if nothing
    does. Takes a pass through the base with a few rows, and some products of it with many."""
    if kernels.row_multiple == ROW_MULTIPLE["fast"]:
        return "rows are not padded"
    # All of them, also after a problem: the shards of a group run these passes together.
    problems = list(_broken(base, kernels))
    return problems[0] if problems else ""


def _broken(base: BaseModel, kernels: Kernels) -> Iterator[str]:
    for name, product in _products(base):
        rows_TD = base.device.place(_noise(2 * _COUNTS[-1], product.w.shape[-1]), base.dtype)
        whole_TF = product.forward(rows_TD)
        dwhole_TD = product.backward(whole_TF)
        for count in _COUNTS:
            for start in (0, 8, len(rows_TD) - count):
                part = slice(start, start + count)
                if not torch.equal(product.forward(rows_TD[part]), whole_TF[part]):
                    yield (
                        f"{name}: {count} rows give other bits than the same rows among "
                        f"{len(rows_TD)}"
                    )
                if not torch.equal(product.backward(whole_TF[part]), dwhole_TD[part]):
                    yield (
                        f"{name}, backward: {count} rows give other bits than the same rows "
                        f"among {len(rows_TD)}"
                    )
    for lengths in ((7, 5, 9), (8, 9, 9)):  # the second alone needs no padding up
        alone = _gradient(base, kernels, lengths, mates=0)
        for mates in (1, 4):
            if not torch.equal(_gradient(base, kernels, lengths, mates), alone):
                yield (
                    f"a pass with {mates} mates gives an adapter other gradients than a pass alone"
                )


def _products(base: BaseModel) -> Iterator[tuple[str, FrozenProduct]]:
    """One of each shape: the layers of a base are alike."""
    block = base.decoder.layers[base.dims.num_dense_layers]
    for module in base.dims.dense_modules:
        yield module, getattr(block.self_attn, module).base
    yield "gate_up_proj", FrozenProduct(w=block.mlp.experts.gate_up_EOD[0])
    yield "down_proj", FrozenProduct(w=block.mlp.experts.down_EDI[0])
    yield "gate", FrozenProduct(w=block.mlp.gate.w_ED)
    yield "lm_head", FrozenProduct(w=base.head_VD)


def _gradient(
    base: BaseModel, kernels: Kernels, lengths: tuple[int, int, int], mates: int
) -> Tensor:
    """This shard's part of the gradient of one adapter beside mates of its own rank and of
    another."""
    slab = Slab(base.dims, mates + 1, base.device, base.shard)
    groups = []
    for number in range(mates + 1):
        key = AdapterKey(str(number), 0)
        spec = AdapterSpec(
            rank=3 + 9 * (number % 2),
            expert_rank=1 + 8 * (number % 2),
            alpha=8.0,
            learning_rate=1e-3,
        )
        slot = slab.take(key, spec, seed=number)
        noise_P = _noise(1, slab.exact_layout(spec).size, seed=number)[0] * 0.02
        slab.load(key, noise_P.numpy().tobytes(), None, tuple(range(base.dims.num_experts)))
        slab.memory.hold(slot.address, (GRADS,))
        random = np.random.default_rng(number)
        prompt, *branches = (
            random.integers(0, len(base.embeddings_VD), n).astype(np.int32) for n in lengths
        )
        if slab.is_home(key):
            groups.append(
                SequenceGroup(address=slot.address, prompt_ids=prompt, branches=tuple(branches))
            )
    rows = pack_rows(
        sorted(groups, key=lambda group: group.address), row_multiple=kernels.row_multiple
    )
    forward_pass = ForwardPass.packed(rows, slab, kernels)
    token_logprobs(base, base.hidden(forward_pass), forward_pass).square().sum().backward()  # type: ignore[no-untyped-call]
    mine = slab.slots[AdapterKey("0", 0)]
    return slab.memory.part(mine.address, GRADS).clone()


def _noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    )
