"""What crosses the Ray boundary: plain frozen records of NumPy arrays, one noun per stage.

    AdapterRef -> RolloutRequest -> RolloutGroup -> TrainGroup -> AdapterBatch -> WaveBatch
    ShardStep -> StepResult

Free of torch, so that what only plans, counts or shows waves loads none of it. In the shapes below
C is a completion's length; the other letters stand in `workers/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from populace.storage.catalog.states import AdapterState, RevisionState
from populace.storage.log.loading import BlobRequest
from populace.storage.log.pack import BlobPlace
from populace.storage.objects.counted import Calls
from populace.workers.shapes import AdapterSpec

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
ExpertIds = NDArray[np.int16]
"""[tokens, L, K]; -1 where unknown."""


class ExperienceKind(StrEnum):
    """What a group of samples came from; it decides how it is learned from (`step/losses.py`)."""

    TASK = "task"
    TRAJECTORY = "trajectory"
    DEMONSTRATION = "demonstration"


class UpdateStatus(StrEnum):
    """What became of an adapter in a step. Only an updated one has new bytes."""

    UPDATED = "updated"
    NO_SIGNAL = "no_signal"
    NON_FINITE = "non_finite"


class AdapterKey(NamedTuple):
    """One revision of one adapter: what a slot holds. Example: `AdapterKey("3f…", 4)`."""

    pseudonym: str
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """An adapter revision and where its bytes are; without places it is the initialisation of
    `seed`.

    Example: `AdapterRef(key=AdapterKey("3f…", 0), spec=spec, seed=71)` needs no bytes at all."""

    key: AdapterKey
    spec: AdapterSpec
    seed: int
    weights: BlobPlace | None = None
    moments: BlobPlace | None = None
    experts: tuple[int, ...] = ()

    def requests(self, with_moments: bool) -> list[BlobRequest]:
        """What is to be loaded: weights, then moments; nothing for an initialisation."""
        parts = {"weights": self.weights, "moments": self.moments if with_moments else None}
        return [
            BlobRequest(
                pseudonym=self.key.pseudonym, revision=self.key.revision, part=part, place=place
            )
            for part, place in parts.items()
            if place is not None
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paging:
    """Where the adapters that a wave needs were found, and what is hot now.

    Example: `Paging(found={"hot": 12, "warm": 3, "cold": 1}, waited_s=0.04, hot=("3f…", …))`."""

    found: dict[str, int]
    """Tier -> adapters; `new` ones are initialised, not loaded."""
    waited_s: float
    """For bytes that weren't in memory yet."""
    hot: tuple[str, ...]
    """Pseudonyms."""
    num_warm: int = 0
    num_near: int = 0
    """Blobs on the local disk."""
    store_calls: Calls = field(default_factory=dict)
    """What the shards asked of the store since the last time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """Answer one prompt `num_samples` times with one adapter."""

    adapter: AdapterKey
    event_id: str
    prompt_ids: Ints
    num_samples: int
    max_new_tokens: int
    temperature: float
    """0 takes the likeliest token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion. What is not known of a logged one is None."""

    completion_ids: Ints
    """[C], the end-of-turn token included where there is one."""
    logprobs: Floats | None
    """[C] natural log-probabilities under the sampling distribution."""
    expert_ids: ExpertIds | None
    """[C-1 or C, L, K]: routing of every completion token that was fed back."""
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All samples of one task. They share the prompt, which is computed once."""

    adapter: AdapterKey
    event_id: str
    prompt_ids: Ints
    prompt_expert_ids: ExpertIds | None
    samples: tuple[Sample, ...]
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSample:
    """One completion and what it is worth."""

    sample: Sample
    reward: float
    base_logprobs: Floats | None
    """[C] under the base alone, by its own routing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainGroup:
    """One event, ready to learn from: all samples of a task, or one logged completion."""

    event_id: str
    kind: ExperienceKind
    prompt_ids: Ints
    prompt_expert_ids: ExpertIds | None
    samples: tuple[ScoredSample, ...]
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBatch:
    """Everything one adapter learns from in this wave."""

    adapter: AdapterKey
    groups: tuple[TrainGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveBatch:
    """Everything that one fused step learns from. No adapter is in it twice."""

    adapters: tuple[AdapterBatch, ...]


class AdapterParts(NamedTuple):
    """What one shard keeps of an adapter, exact and fp32: the dense part under -1, experts under
    their numbers."""

    weights: dict[int, Floats]
    m: dict[int, Floats]
    v: dict[int, Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardUpdate:
    """One shard's part of an `AdapterUpdate`."""

    adapter: AdapterKey
    status: UpdateStatus
    state: tuple[float, float, float]
    """Step, reward baseline, number of rewards: equal on every shard."""
    experts: tuple[int, ...]
    parts: AdapterParts | None
    """None unless `status` is updated."""
    metrics: dict[str, float]
    """Empty but at the adapter's home."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStep:
    """What a wave gave on one shard; updates in the order of the batch."""

    updates: tuple[ShardUpdate, ...]
    num_rows: int
    out_of_route: tuple[int, int]
    """`StepResult.out_of_route`, already of the whole group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUpdate:
    """What one adapter's step gave. Bytes are fp32 little-endian in `AdapterLayout` order, without
    the experts that no token ever reached. Moments are step, baseline and reward count as three
    fp64, then m, then v."""

    adapter: AdapterKey
    status: UpdateStatus
    weights: bytes
    moments: bytes
    experts: tuple[int, ...]
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one fused step gave; updates in the order of the batch."""

    updates: tuple[AdapterUpdate, ...]
    num_rows: int
    """Rows that went through the base, forward and backward."""
    out_of_route: tuple[int, int] = (0, 0)
    """(different, all): replayed selections, by row and layer, that the trainer's own gates would
    have made otherwise, and how many there were."""


def revision_ref(adapter: AdapterState, state: RevisionState | None) -> AdapterRef:
    """How workers find the bytes of an adapter's revision; None: of revision 0, which has none."""
    key = AdapterKey(adapter.pseudonym, 0 if state is None else state.revision)
    spec = AdapterSpec.from_dict(adapter.spec)
    if state is None:
        return AdapterRef(key=key, spec=spec, seed=adapter.seed)
    return AdapterRef(
        key=key,
        spec=spec,
        seed=adapter.seed,
        weights=state.blobs["weights"],
        moments=state.blobs.get("moments"),
        experts=state.experts,
    )
