"""One shard at work: base, slab, rollouts, scoring, the fused step. What the Ray actor wraps; free
of Ray."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import transformers

from populace.configs.schema import OptimizerSettings, ResidencySettings, TrainSettings
from populace.storage.errors import InvalidInput
from populace.storage.keys.keyring import Keyring
from populace.storage.keys.user_keys import UserKeys
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.counted import CountedStore
from populace.storage.objects.open import open_store
from populace.workers.adapters.residency import Residency
from populace.workers.adapters.slab import Slab
from populace.workers.base.families import dims_of_config
from populace.workers.base.footprint import config_of, tensors_of
from populace.workers.base.forward import ForwardPass, Kernels
from populace.workers.base.logprobs import token_logprobs
from populace.workers.base.model import BaseModel
from populace.workers.base.rows import SequenceGroup, pack_rows
from populace.workers.batch import (
    AdapterKey,
    AdapterRef,
    Floats,
    Paging,
    RolloutGroup,
    RolloutRequest,
    ShardStep,
    StepResult,
    WaveBatch,
)
from populace.workers.device import Cuda, Device, device_of
from populace.workers.joins import join_steps
from populace.workers.memory import MemoryPlan, WaveLimits, held_of, plan_memory
from populace.workers.shapes import BaseDims
from populace.workers.shards.exchange import ALONE, Exchange
from populace.workers.shards.placement import NO_SLOT
from populace.workers.step.numerics import NUMERICS_REVISION, probe_invariance
from populace.workers.step.optimizer import optimizer_name
from populace.workers.step.rollout import roll_out
from populace.workers.step.train import train_wave

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSettings:
    """What an actor needs to know to start."""

    base_folder: str
    dtype: str
    store_url: str
    population: str
    slots: int
    threads: int
    """0: all CPUs."""
    eos_ids: frozenset[int]
    train: TrainSettings = field(default_factory=TrainSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    residency: ResidencySettings = field(default_factory=ResidencySettings)
    num_shards: int = 1
    dense: str = "replicated"
    device: str = "auto"
    """See `base.device` in configs/schema.py."""
    limits: WaveLimits = field(default_factory=WaveLimits, compare=False)
    """What waves may ask of a shard's memory at most; looked at before the base is loaded."""


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back: a pass allocates and frees gigabytes, and faulting
    them in anew costs more than using them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        largest = 2**31 - 1
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(parameter, largest)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class ShardEngine:
    """The methods of a shard group, in this process."""

    def __init__(
        self,
        settings: ShardSettings,
        store: ObjectStore | None = None,
        rank: int = 0,
        exchange: Exchange = ALONE,
        device: Device | None = None,
    ) -> None:
        """One of `settings.num_shards`; the others are reached through `exchange`. `device`: what
        the settings ask for, if it was opened already."""
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        device = device or device_of(settings.device, settings.dtype)
        self.kernels = Kernels.of(settings.train, device)
        _check_device(settings, device)
        self.base = BaseModel(
            Path(settings.base_folder),
            device,
            rank,
            settings.num_shards,
            exchange,
            dense=settings.dense,
        )
        self._counted = CountedStore(open_store(settings.store_url)) if store is None else None
        self._store: ObjectStore = store or self._counted  # type: ignore[assignment]  # one of the two
        self.reset()

    def reset(self) -> None:
        """Forget everything hot."""
        self.slab = Slab(self.base.dims, self.settings.slots, self.base.device, self.base.shard)
        keys = UserKeys(self._store, self.settings.population, Keyring())
        self.residency = Residency(self.slab, self._store, keys, self.settings.residency)

    @functools.cached_property
    def why_fast(self) -> str:
        """What keeps numerics from being invariant here; empty if nothing does."""
        if self.settings.dense == "zero3":
            return "ZeRO-3 adds up a row's gradients in an order of its own"
        if self.base.device.is_cuda:
            # And by lengths that no short probe has.
            return "attention on CUDA is torch's, which adds in an order of its own"
        return probe_invariance(self.base, self.kernels)

    @functools.cached_property
    def numerics(self) -> str:
        """`invariant` if this machine keeps that promise, else `fast`."""
        if self.why_fast:
            logger.warning("numerics are `fast`, revisions can't be replayed: %s", self.why_fast)
        return "fast" if self.why_fast else "invariant"

    def describe(self) -> tuple[BaseDims, dict[str, str]]:
        """Shapes of the base, and the numerics fingerprint of this shard."""
        return self.base.dims, {
            **self.base.device.fingerprint(),
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "kernels": str(NUMERICS_REVISION),
            "backend": self.kernels.backend,
            "optimizer": optimizer_name(self.settings.optimizer),
            "threads": str(torch.get_num_threads()),
            "numerics": self.numerics,
        }

    def prefetch(self, refs: Sequence[AdapterRef]) -> None:
        self.residency.prefetch(refs)

    def page_in(
        self, refs: Sequence[AdapterRef], with_moments: bool, keep: Sequence[AdapterKey] = ()
    ) -> Paging:
        paging = self.residency.page_in(refs, with_moments, keep)
        return (
            paging
            if self._counted is None
            else replace(paging, store_calls=self._counted.take_calls())
        )

    def evict(self, keys: Sequence[AdapterKey]) -> None:
        self.residency.evict(keys)

    def committed(self, pairs: Sequence[tuple[AdapterKey, AdapterKey]]) -> None:
        for old, new in pairs:
            self.residency.committed(old, new)

    def forget(self, pseudonyms: Sequence[str]) -> None:
        self.residency.forget(pseudonyms)

    def roll_out(self, requests: Sequence[RolloutRequest]) -> list[RolloutGroup]:
        """Answers of a group of one shard; see `roll_out_share`."""
        return join_shares([self.roll_out_share(requests)])

    def roll_out_share(self, requests: Sequence[RolloutRequest]) -> list[RolloutGroup | None]:
        """Answers to the requests of adapters that are at home here."""
        try:
            for key in {request.adapter for request in requests}:
                self.slab.read(key, "rollout")
            return roll_out(self.base, self.slab, requests, self.settings.eos_ids, self.kernels)
        finally:
            self.slab.done_reading("rollout")

    def score_base(self, groups: Sequence[RolloutGroup]) -> list[tuple[Floats, ...]]:
        """Scores of a group of one shard; see `score_base_share`."""
        return join_shares([self.score_base_share(groups)])

    @torch.no_grad()
    def score_base_share(self, groups: Sequence[RolloutGroup]) -> list[tuple[Floats, ...] | None]:
        """Log-probabilities of every completion under the base alone, by its own routing: one tuple
        of [C] per group; None for those that other shards score. Runs in passes of
        `max_rows_per_pass` per shard."""
        scores: list[tuple[Floats, ...] | None] = [None] * len(groups)
        shard = self.base.shard
        for part in _parts(groups, self.settings.train.max_rows_per_pass, shard.num_shards):
            own = [number for number in part if number % shard.num_shards == shard.rank]
            sequences = [_without_adapter(groups[number]) for number in own]
            rows = pack_rows(sequences, row_multiple=self.kernels.row_multiple)
            forward_pass = ForwardPass.packed(rows, None, self.kernels)
            logprob_N = token_logprobs(self.base, self.base.hidden(forward_pass), forward_pass)
            (scored_N,) = self.kernels.device.download(logprob_N).arrays()
            pieces = iter(np.split(scored_N, np.cumsum(rows.target_counts)[:-1]))
            for number, sequence in zip(own, sequences, strict=True):
                scores[number] = tuple(next(pieces) for _ in sequence.branches)
        return scores

    def train_wave(
        self,
        batch: WaveBatch,
        train: TrainSettings | None = None,
        optimizer: OptimizerSettings | None = None,
    ) -> StepResult:
        """One fused step of a group of one shard; see `train_share`. Replays give settings other
        than this shard's own."""
        own = self.settings
        train, optimizer = train or own.train, optimizer or own.optimizer
        step = train_wave(self.base, self.slab, batch, train, optimizer, self.kernels)
        return join_steps([step])

    def train_share(self, batch: WaveBatch) -> ShardStep:
        """This shard's part of a wave."""
        own = self.settings
        return train_wave(self.base, self.slab, batch, own.train, own.optimizer, self.kernels)


def _check_device(settings: ShardSettings, device: Device) -> None:
    """`InvalidInput` for what only CPUs do, and for what a card has no room for."""
    if not isinstance(device, Cuda):
        return
    if settings.optimizer.offload:
        raise InvalidInput(
            "optimizer.offload is true, which updates moments where a CPU computes, and this shard "
            "computes on a CUDA device; set it to false, or base.device=cpu"
        )
    if settings.dense == "zero3":
        raise InvalidInput(
            "shard.dense is 'zero3', which cuts parameters on CPUs alone, and this shard computes "
            "on a CUDA device; use replicated, or base.device=cpu"
        )
    _memory_plan(settings, device).require(device.free_bytes(), "the CUDA device")


def _memory_plan(settings: ShardSettings, device: Device) -> MemoryPlan:
    """What this shard will need, from the base's config alone."""
    config = config_of(settings.base_folder)
    dims = dims_of_config(config)
    held = held_of(dims, tensors_of(config), settings.num_shards, device.dtype.itemsize)
    limits = replace(settings.limits, slots=settings.slots, rows=settings.train.max_rows_per_pass)
    # The context is there already, and not free any more.
    return plan_memory(dims, held, limits, context_bytes=0.0)


def join_shares(shares: Sequence[Sequence[Answer | None]]) -> list[Answer]:
    """Every answer from the shard that has it."""
    return [
        next(answer for answer in answers if answer is not None)
        for answers in zip(*shares, strict=True)
    ]


def _without_adapter(group: RolloutGroup) -> SequenceGroup:
    return SequenceGroup(
        address=NO_SLOT,
        prompt_ids=group.prompt_ids,
        branches=tuple(sample.completion_ids for sample in group.samples),
        temperature=group.temperature,
    )


def _parts(groups: Sequence[RolloutGroup], max_rows: int, num_shards: int) -> list[list[int]]:
    """Numbers of the groups of each pass, with at most `max_rows` rows for each shard, which take
    them in turn."""
    parts: list[list[int]] = []
    rows = Counter[int]()
    for number, group in enumerate(groups):
        num_rows = _without_adapter(group).num_rows
        shard = number % num_shards
        if not parts or (rows[shard] and rows[shard] + num_rows > max_rows):
            parts.append([])
            rows = Counter()
        parts[-1].append(number)
        rows[shard] += num_rows
    return parts
