"""What compaction keeps of the experience log, and the newest segments read."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from populace.population.experience.segments import Row
from populace.storage.log.records import Compaction, Position
from populace.storage.lru import Tier

_OVERHEAD_BYTES = 300
"""Of a cached segment besides its bytes."""

Payload = tuple[str, str, bytes]
"""Pseudonym, tag, sealed."""


class SegmentCache:
    """The newest segments read, up to a number of bytes: a wave mostly takes what has just come in.
    As they are stored, because an Arrow table of a few rows takes several times the memory."""

    def __init__(self, max_bytes: int) -> None:
        self._segments = Tier[tuple[int, int]](max_bytes)
        self._bodies: dict[tuple[int, int], bytes] = {}

    def put(self, partition: int, segment: int, body: bytes) -> None:
        self._bodies[partition, segment] = body
        for gone in self._segments.put((partition, segment), len(body) + _OVERHEAD_BYTES):
            del self._bodies[gone]

    def get(self, partition: int, segment: int) -> bytes | None:
        return self._bodies.get((partition, segment))


class Snapshot:
    """What a compaction kept, by position."""

    def __init__(self, compaction: Compaction, tables: list[pa.Table]) -> None:
        self.compaction, self.tables = compaction, tables
        self._places = _packed(
            tables[0].column("segment").to_numpy(), tables[0].column("row").to_numpy()
        )

    def payload(self, position: Position) -> Payload:
        place = _packed(np.array([position[0]]), np.array([position[1]]))[0]
        number = int(np.searchsorted(self._places, place))
        assert number < len(self._places) and self._places[number] == place, (
            f"{position} is not in the snapshot"
        )
        return payload_at(self.tables[0], number)


def _packed(segment: NDArray[np.integer], row: NDArray[np.integer]) -> NDArray[np.uint64]:
    return (segment.astype(np.uint64) << np.uint64(32)) | row.astype(np.uint64)


def payload_at(table: pa.Table, number: int) -> Payload:
    pseudonym, tag, sealed = (
        table.column(name)[number].as_py() for name in ("pseudonym", "tag", "sealed")
    )
    return pseudonym, tag, sealed


def row_from(pseudonym: str, tag: str, sealed: bytes) -> Row:
    return {"pseudonym": pseudonym, "tag": tag, "sealed": sealed}
