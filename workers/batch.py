"""What crosses the Ray boundary: plain frozen records of NumPy arrays, one noun per stage.

    AdapterRef -> RolloutRequest -> RolloutGroup -> TrainGroup -> AdapterBatch -> WaveBatch -> ShardStep -> StepResult

Suffixes: P prompt tokens, C completion tokens, L layers, K experts per token.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from populace.storage.catalog.states import AdapterState, RevisionState
from populace.storage.log.loading import BlobRequest
from populace.storage.log.pack import BlobPlace
from populace.storage.objects.counted import Calls
from populace.workers.layout import AdapterSpec

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
    """An adapter revision and where its bytes are; without places it is the initialisation of `seed`."""

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
            BlobRequest(pseudonym=self.key.pseudonym, revision=self.key.revision, part=part, place=place)
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
    """What one shard keeps of an adapter, exact and fp32: the dense part under -1, experts under their numbers."""

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
    """What one adapter's step gave. `status`: updated, no_signal or non_finite; only `updated` has bytes: fp32
    little-endian in `AdapterLayout` order, without the experts that no token ever reached; the moments are step,
    baseline and reward count as three fp64, then m, then v."""

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
    """Of all replayed selections (row and layer), how many the trainer's own gates would have made otherwise, and how
    many there were."""


def join_steps(steps: Sequence[ShardStep]) -> StepResult:
    """What a wave gave, from what it gave on every shard of the group."""
    return StepResult(
        updates=tuple(_join_updates(shares) for shares in zip(*(step.updates for step in steps), strict=True)),
        num_rows=sum(step.num_rows for step in steps),
        out_of_route=steps[0].out_of_route,
    )


def _join_updates(shares: Sequence[ShardUpdate]) -> AdapterUpdate:
    first, weights, moments = shares[0], b"", b""
    if first.status == "updated":
        weights, moments = join_parts(first.state, [share.parts for share in shares if share.parts is not None])
    metrics = {name: value for share in shares for name, value in share.metrics.items()}
    return AdapterUpdate(
        adapter=first.adapter,
        status=first.status,
        weights=weights,
        moments=moments,
        experts=first.experts,
        metrics=metrics,
    )


def join_parts(state: tuple[float, float, float], shares: Sequence[AdapterParts]) -> tuple[bytes, bytes]:
    """Weights and moments as blobs, from what every shard keeps of the adapter; see `AdapterUpdate`."""
    columns = [_in_order([own[kind] for own in shares]) for kind in range(3)]
    return b"".join(columns[0]), b"".join([np.array(state, np.float64).tobytes(), *columns[1], *columns[2]])


def _in_order(shares: Sequence[dict[int, Floats]]) -> list[memoryview]:
    merged = {part: values for share in shares for part, values in share.items()}
    return [merged[part].data for part in sorted(merged)]


_EVIDENCE = pa.schema(
    [
        ("event_id", pa.string()),
        ("kind", pa.string()),
        ("temperature", pa.float64()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("prompt_expert_ids", pa.binary()),
        ("completion_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("base_logprobs", pa.list_(pa.float32())),
        ("expert_ids", pa.binary()),
        ("finished", pa.bool_()),
        ("reward", pa.float64()),
    ]
)


def encode_evidence(groups: Sequence[TrainGroup]) -> bytes:
    """What a revision learned from, as an Arrow IPC stream with one row per sample; expert ids are `.npy`."""
    rows = [
        {
            "event_id": group.event_id,
            "kind": group.kind,
            "temperature": group.temperature,
            "prompt_ids": group.prompt_ids,
            "prompt_expert_ids": _to_npy(group.prompt_expert_ids),
            "completion_ids": scored.sample.completion_ids,
            "logprobs": scored.sample.logprobs,
            "base_logprobs": scored.base_logprobs,
            "expert_ids": _to_npy(scored.sample.expert_ids),
            "finished": scored.sample.finished,
            "reward": scored.reward,
        }
        for group in groups
        for scored in group.samples
    ]
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=_EVIDENCE)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def decode_evidence(body: bytes) -> tuple[TrainGroup, ...]:
    """The inverse of `encode_evidence`."""
    groups: dict[str, list[dict[str, object]]] = {}
    for row in pa.ipc.open_stream(body).read_all().to_pylist():
        groups.setdefault(row["event_id"], []).append(row)
    return tuple(_group_from_rows(rows) for rows in groups.values())


def _group_from_rows(rows: list[dict[str, object]]) -> TrainGroup:
    def array(value: object, dtype: type) -> NDArray[np.generic] | None:
        return None if value is None else np.asarray(value, dtype=dtype)

    first = rows[0]
    return TrainGroup(
        event_id=str(first["event_id"]),
        kind=str(first["kind"]),
        temperature=float(first["temperature"]),  # type: ignore[arg-type]
        prompt_ids=np.asarray(first["prompt_ids"], dtype=np.int32),
        prompt_expert_ids=_from_npy(first["prompt_expert_ids"]),
        samples=tuple(
            ScoredSample(
                sample=Sample(
                    completion_ids=np.asarray(row["completion_ids"], dtype=np.int32),
                    logprobs=array(row["logprobs"], np.float32),  # type: ignore[arg-type]
                    expert_ids=_from_npy(row["expert_ids"]),
                    finished=bool(row["finished"]),
                ),
                reward=float(row["reward"]),  # type: ignore[arg-type]
                base_logprobs=array(row["base_logprobs"], np.float32),  # type: ignore[arg-type]
            )
            for row in rows
        ),
    )


def _to_npy(ids: ExpertIds | None) -> bytes | None:
    if ids is None:
        return None
    sink = io.BytesIO()
    np.save(sink, ids, allow_pickle=False)
    return sink.getvalue()


def _from_npy(body: object) -> ExpertIds | None:
    if body is None:
        return None
    ids: ExpertIds = np.load(io.BytesIO(body), allow_pickle=False)  # type: ignore[arg-type]
    return ids


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
