"""Shards' shares of a wave become one result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from populace.workers.batch import (
    AdapterParts,
    AdapterUpdate,
    Floats,
    ShardStep,
    ShardUpdate,
    StepResult,
    UpdateStatus,
)


def join_steps(steps: Sequence[ShardStep]) -> StepResult:
    """What a wave gave, from what it gave on every shard of the group."""
    return StepResult(
        updates=tuple(
            _join_updates(shares) for shares in zip(*(step.updates for step in steps), strict=True)
        ),
        num_rows=sum(step.num_rows for step in steps),
        out_of_route=steps[0].out_of_route,
    )


def _join_updates(shares: Sequence[ShardUpdate]) -> AdapterUpdate:
    first, weights, moments = shares[0], b"", b""
    if first.status is UpdateStatus.UPDATED:
        weights, moments = join_parts(
            first.state, [share.parts for share in shares if share.parts is not None]
        )
    metrics = {name: value for share in shares for name, value in share.metrics.items()}
    return AdapterUpdate(
        adapter=first.adapter,
        status=first.status,
        weights=weights,
        moments=moments,
        experts=first.experts,
        metrics=metrics,
    )


def join_parts(
    state: tuple[float, float, float], shares: Sequence[AdapterParts]
) -> tuple[bytes, bytes]:
    """Weights and moments as blobs, from what every shard keeps of the adapter; see
    `AdapterUpdate`."""
    columns = [_in_order([own[kind] for own in shares]) for kind in range(3)]
    return b"".join(columns[0]), b"".join(
        [np.array(state, np.float64).tobytes(), *columns[1], *columns[2]]
    )


def _in_order(shares: Sequence[dict[int, Floats]]) -> list[memoryview]:
    merged = {part: values for share in shares for part, values in share.items()}
    return [merged[part].data for part in sorted(merged)]
