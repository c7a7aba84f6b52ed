"""What crosses the Ray boundary: plain frozen records of NumPy arrays, one noun per stage.

    AdapterRef -> RolloutRequest -> RolloutGroup -> TrainGroup -> AdapterBatch -> WaveBatch ->
    ShardStep -> StepResult

Suffixes: P prompt tokens, C completion tokens, L layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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


class AdapterKey(NamedTuple):
    """One revision of one adapter: what a slot holds."""

    pseudonym: str
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """An adapter revision and where its bytes are; without places it is the initialisation of
    `seed`."""

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
    """Where adapters were found that a wave needs, and what is hot now."""

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
    sample: Sample
    reward: float
    base_logprobs: Floats | None
    """[C] under the base alone, by its own routing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainGroup:
    """One event, ready to learn from. `kind` is task, trajectory or demonstration."""

    event_id: str
    kind: str
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
    status: str
    state: tuple[float, float, float]
    """Step, reward baseline, number of rewards: the same on every shard."""
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
    """As in `StepResult`, already of the whole group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUpdate:
    """What one adapter's step gave. `status`: updated, no_signal or non_finite; only `updated` has
    bytes: fp32 little-endian in `AdapterLayout` order, without the experts that no token ever
    reached; the moments are step, baseline and reward count as three fp64, then m, then v."""

    adapter: AdapterKey
    status: str
    weights: bytes
    moments: bytes
    experts: tuple[int, ...]
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    updates: tuple[AdapterUpdate, ...]
    num_rows: int
    """Rows that went through the base, forward and backward."""
    out_of_route: tuple[int, int] = (0, 0)
    """Of all replayed selections (row and layer), how many the trainer's own gates would have made
    otherwise, and how many there were."""


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
