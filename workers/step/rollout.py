"""Batched sampling for many adapters at once, with a KV cache.

A user's samples don't depend on who is decoded beside them: the noise of a sample is drawn from a
counter-based generator keyed by (adapter seed, revision, event, sample), one number per position.

Suffixes: B sequences that still run, T rows, V vocabulary, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from populace.workers.adapters.slab import Slab
from populace.workers.base.attention import PackedAttention
from populace.workers.base.forward import ForwardPass, Kernels
from populace.workers.base.kv_cache import CachedAttention, KvCache
from populace.workers.base.model import BaseModel
from populace.workers.base.rows import PackedRows, SequenceGroup, pack_rows
from populace.workers.batch import RolloutGroup, RolloutRequest, Sample
from populace.workers.shards.placement import NO_SLOT, SlotAddress
from populace.workers.step.sampling import inverse_transform, uniforms_of


class _Sequence:
    """One sample while it grows."""

    def __init__(
        self,
        number: int,
        request: int,
        address: SlotAddress,
        uniforms: np.ndarray[tuple[int], np.dtype[np.float64]],
    ):
        self.number, self.request, self.address = number, request, address
        self.uniforms = uniforms
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.expert_ids: list[np.ndarray[tuple[int, ...], np.dtype[np.int16]]] = []
        self.finished = False


@torch.no_grad()
def roll_out(
    base: BaseModel,
    slab: Slab,
    requests: Sequence[RolloutRequest],
    eos_ids: frozenset[int],
    kernels: Kernels,
) -> list[RolloutGroup | None]:
    """Answer every request whose adapter is at home on this shard; all adapters must be in the
    slab. Groups come in the order of the requests, None for those of other shards. The shards of a
    group decode in step, because each one's rows need the others' experts."""
    own = [index for index, request in enumerate(requests) if slab.is_home(request.adapter)]
    ordered = sorted(own, key=lambda index: _address(slab, requests[index]))
    rows = pack_rows(
        [
            SequenceGroup(
                address=_address(slab, requests[i]), prompt_ids=requests[i].prompt_ids, branches=()
            )
            for i in ordered
        ],
        row_multiple=kernels.row_multiple,
    )
    attention = PackedAttention(rows, keep=True)
    forward_pass = ForwardPass.of(rows, attention, slab, kernels, record_routing=True)
    hidden_TD = base.hidden(forward_pass)
    prompt_ids = torch.split(forward_pass.recorded_TLK(), list(rows.group_lengths))[: len(ordered)]
    prompt_expert_ids = dict(zip(ordered, (ids.numpy() for ids in prompt_ids), strict=True))

    running = [
        _Sequence(number, i, _address(slab, requests[i]), uniforms_of(slab, requests[i], sample))
        for number, (i, sample) in enumerate(
            (i, k) for i in ordered for k in range(requests[i].num_samples)
        )
    ]
    sequences = list(running)
    samples_G = torch.tensor([requests[i].num_samples for i in ordered], dtype=torch.int64)
    new_G = torch.tensor([requests[i].max_new_tokens for i in ordered], dtype=torch.int64)
    cache = KvCache(attention, samples_G, new_G)
    last_G = torch.tensor(rows.group_lengths[: len(ordered)], dtype=torch.int64).cumsum(0) - 1
    hidden_BD = torch.repeat_interleave(hidden_TD[last_G], samples_G, dim=0)
    while True:
        if running:
            _choose(
                _logits(base, hidden_BD, running, requests, kernels), running, requests, eos_ids
            )
        running = [item for item in running if not item.finished]
        if not base.exchange.any(bool(running)):
            break
        attention_now = CachedAttention(cache, [item.number for item in running])
        forward_pass = ForwardPass.of(
            _decode_rows(running, cache, kernels), attention_now, slab, kernels, record_routing=True
        )
        hidden_BD = base.hidden(forward_pass)[: len(running)]
        for item, ids in zip(
            running, forward_pass.recorded_TLK()[: len(running)].numpy(), strict=True
        ):
            item.expert_ids.append(ids)
        cache.length_U[torch.tensor([item.number for item in running], dtype=torch.int64)] += 1
    return _groups(requests, sequences, prompt_expert_ids, eos_ids, base.routing_shape)


def _logits(
    base: BaseModel,
    hidden_BD: Tensor,
    running: Sequence[_Sequence],
    requests: Sequence[RolloutRequest],
    kernels: Kernels,
) -> Tensor:
    """[B, V] fp32, divided by each sequence's temperature; greedy counts as 1."""
    temperature_B = torch.tensor(
        [requests[item.request].temperature or 1.0 for item in running], dtype=base.dtype
    )
    # Dividing the hidden state is dividing the logits, at a hundredth of the cost.
    scaled_BD = hidden_BD / temperature_B[:, None]
    return base.logits(pad(scaled_BD, (0, 0, 0, -len(scaled_BD) % kernels.row_multiple)))[
        : len(running)
    ]


def _choose(
    logits_BV: Tensor,
    running: Sequence[_Sequence],
    requests: Sequence[RolloutRequest],
    eos_ids: frozenset[int],
) -> None:
    """Append one token to every sequence: inverse transform sampling with the sequence's own
    number."""
    greedy_B = torch.tensor([requests[item.request].temperature == 0 for item in running])
    prob_BV = torch.softmax(logits_BV, dim=1)
    uniform_B = torch.tensor([item.uniforms[len(item.tokens)] for item in running])
    token_B = torch.where(greedy_B, logits_BV.argmax(1), inverse_transform(prob_BV, uniform_B))
    chosen_B = prob_BV.gather(1, token_B[:, None]).squeeze(1).log()
    for item, token, logprob in zip(running, token_B.tolist(), chosen_B.tolist(), strict=True):
        item.tokens.append(token)
        item.logprobs.append(logprob)
        item.finished = (
            token in eos_ids or len(item.tokens) >= requests[item.request].max_new_tokens
        )


def _decode_rows(running: Sequence[_Sequence], cache: KvCache, kernels: Kernels) -> PackedRows:
    """One row per sequence: its newest token at its next position."""
    padding = -len(running) % kernels.row_multiple if running else kernels.row_multiple
    num_rows = len(running) + padding
    slots = [item.address for item in running] + [NO_SLOT] * padding
    slot_T2 = torch.tensor(slots)
    positions = cache.length_U[torch.tensor([item.number for item in running], dtype=torch.int64)]
    return PackedRows(
        token_T=torch.tensor([item.tokens[-1] for item in running] + [0] * padding),
        position_T=pad(positions, (0, padding)),
        arena_T=slot_T2[:, 0].contiguous(),
        slot_T=slot_T2[:, 1].contiguous(),
        branch_T=torch.full((num_rows,), -1),
        group_lengths=(1,) * num_rows,
        expert_ids_TLK=None,
        target_row_N=torch.zeros(0, dtype=torch.int64),
        target_token_N=torch.zeros(0, dtype=torch.int64),
        target_masked_N=torch.zeros(0, dtype=torch.bool),
        temperature_N=torch.zeros(0),
        target_counts=(),
    )


def _groups(
    requests: Sequence[RolloutRequest],
    sequences: Sequence[_Sequence],
    prompt_expert_ids: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.int16]]],
    eos_ids: frozenset[int],
    routing_shape: tuple[int, int],
) -> list[RolloutGroup | None]:
    samples: dict[int, list[Sample]] = {}
    for item in sequences:
        samples.setdefault(item.request, []).append(
            Sample(
                completion_ids=np.asarray(item.tokens, dtype=np.int32),
                logprobs=np.asarray(item.logprobs, dtype=np.float32),
                expert_ids=np.stack(item.expert_ids)
                if item.expert_ids
                else np.zeros((0, *routing_shape), np.int16),
                finished=item.tokens[-1] in eos_ids,
            )
        )
    return [
        RolloutGroup(
            adapter=request.adapter,
            event_id=request.event_id,
            prompt_ids=request.prompt_ids,
            prompt_expert_ids=prompt_expert_ids[index],
            samples=tuple(samples[index]),
            temperature=request.temperature or 1.0,
        )
        if index in samples
        else None
        for index, request in enumerate(requests)
    ]


def _address(slab: Slab, request: RolloutRequest) -> SlotAddress:
    return slab.slots[request.adapter].address
