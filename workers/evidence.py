"""Evidence: what a revision learned from, as bytes that are kept with it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from populace.workers.batch import ExperienceKind, ExpertIds, Sample, ScoredSample, TrainGroup

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
    """What a revision learned from, as an Arrow IPC stream with one row per sample; expert ids are
    `.npy`."""
    rows = [
        {
            "event_id": group.event_id,
            "kind": str(group.kind),
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
        kind=ExperienceKind(str(first["kind"])),
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
