"""Batched sampling for many adapters at once, with a KV cache.

A user's samples don't depend on who is decoded beside them: the noise of a sample is drawn from a
counter-based generator keyed by (adapter seed, revision, event, sample), one number per position.

Suffixes: B sequences that still run, T rows, V vocabulary, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from populace.workers.adapters.slab import Slab
from populace.workers.base.attention import PackedAttention
from populace.workers.base.forward import ForwardPass, Kernels
from populace.workers.base.kv_cache import CachedAttention, DecodePlan, KvCache
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
    prompts = [(_address(slab, requests[i]), requests[i].prompt_ids) for i in ordered]
    rows = pack_rows(
        [SequenceGroup(address=at, prompt_ids=ids, branches=()) for at, ids in prompts],
        row_multiple=kernels.row_multiple,
    )
    forward_pass = ForwardPass.packed(rows, slab, kernels, keep=True, record_routing=True)
    attention = forward_pass.attention
    assert isinstance(attention, PackedAttention)
    hidden_TD = base.hidden(forward_pass)
    routing = [forward_pass.recorded_TLK()]
    """Of the prompts, then of every step; downloaded at the end."""

    running = _sequences(slab, requests, ordered)
    sequences = list(running)
    lengths_G = np.array(rows.group_lengths[: len(ordered)], np.int64)
    samples_G = np.array([requests[i].num_samples for i in ordered], np.int64)
    new_G = np.array([requests[i].max_new_tokens for i in ordered], np.int64)
    cache = KvCache(attention, lengths_G, samples_G, new_G, kernels.device)
    last_B = np.repeat(lengths_G.cumsum() - 1, samples_G)
    (last_there_B,) = kernels.device.upload(torch.from_numpy(last_B))
    hidden_BD = hidden_TD.index_select(0, last_there_B)
    steps: list[list[_Sequence]] = []
    while True:
        if running:
            _choose(base, hidden_BD, running, requests, eos_ids, kernels)
        running = [item for item in running if not item.finished]
        if not base.exchange.any(bool(running)):
            break
        there, plan = kernels.device.upload(
            _decode_rows(running, cache, kernels),
            DecodePlan.of(cache, [item.number for item in running]),
        )
        forward_pass = ForwardPass.of(
            there, CachedAttention(cache, plan), slab, kernels, record_routing=True
        )
        hidden_BD = base.hidden(forward_pass)[: len(running)]
        routing.append(forward_pass.recorded_TLK())
        steps.append(running)
        cache.length_U[[item.number for item in running]] += 1
    prompts_TLK, *decoded = kernels.device.download(*routing).arrays()
    for step, ids_BLK in zip(steps, decoded, strict=True):
        for item, ids_LK in zip(step, ids_BLK[: len(step)], strict=True):
            item.expert_ids.append(ids_LK)
    prompt_ids = np.split(prompts_TLK, lengths_G.cumsum())[: len(ordered)]
    prompt_expert_ids = dict(zip(ordered, prompt_ids, strict=True))
    return _groups(requests, sequences, prompt_expert_ids, eos_ids, base.routing_shape)


def _sequences(
    slab: Slab, requests: Sequence[RolloutRequest], ordered: Sequence[int]
) -> list[_Sequence]:
    """All samples of all requests, in the order of their prompts."""
    samples = ((i, k) for i in ordered for k in range(requests[i].num_samples))
    return [
        _Sequence(number, i, _address(slab, requests[i]), uniforms_of(slab, requests[i], k))
        for number, (i, k) in enumerate(samples)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    """What one token of every running sequence is drawn with."""

    temperature_B: Tensor
    """In the base's dtype; greedy counts as 1."""
    is_greedy_B: Tensor
    uniform_B: Tensor


def _choose(
    base: BaseModel,
    hidden_BD: Tensor,
    running: Sequence[_Sequence],
    requests: Sequence[RolloutRequest],
    eos_ids: frozenset[int],
    kernels: Kernels,
) -> None:
    """Append one token to every sequence: inverse transform sampling with the sequence's own
    number."""
    temperatures = [requests[item.request].temperature for item in running]
    (draw,) = kernels.device.upload(
        _Draw(
            temperature_B=torch.tensor([value or 1.0 for value in temperatures], dtype=base.dtype),
            is_greedy_B=torch.tensor([value == 0 for value in temperatures]),
            uniform_B=torch.tensor([item.uniforms[len(item.tokens)] for item in running]),
        )
    )
    # Dividing the hidden state is dividing the logits, at a hundredth of the cost.
    scaled_BD = hidden_BD / draw.temperature_B[:, None]
    padded = pad(scaled_BD, (0, 0, 0, -len(scaled_BD) % kernels.row_multiple))
    logits_BV = base.logits(padded)[: len(running)]
    prob_BV = torch.softmax(logits_BV, dim=1)
    drawn_B = inverse_transform(prob_BV, draw.uniform_B)
    token_B = torch.where(draw.is_greedy_B, logits_BV.argmax(1), drawn_B)
    chosen_B = prob_BV.gather(1, token_B[:, None]).squeeze(1).log()
    # The host has to know who is done, and writes the next step's rows: one wait a token.
    tokens, logprobs = (own.tolist() for own in kernels.device.download(token_B, chosen_B).arrays())
    for item, token, logprob in zip(running, tokens, logprobs, strict=True):
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
    positions = torch.from_numpy(cache.length_U[[item.number for item in running]])
    return PackedRows(
        token_T=torch.tensor([item.tokens[-1] for item in running] + [0] * padding),
        position_T=pad(positions, (0, padding)),
        arena_T=slot_T2[:, 0].contiguous(),
        slot_T=slot_T2[:, 1].contiguous(),
        branch_T=torch.full((num_rows,), -1),
        group_lengths=(1,) * num_rows,
        has_adapters=bool(running),
        expert_ids_TLK=None,
        target_row_N=torch.zeros(0, dtype=torch.int64),
        target_token_N=torch.zeros(0, dtype=torch.int64),
        target_masked_N=torch.zeros(0, dtype=torch.bool),
        temperature_N=torch.zeros(0),
        target_rounds=(),
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
