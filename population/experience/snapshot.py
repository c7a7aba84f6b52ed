"""What compaction keeps of the experience log, and what a process keeps of it in memory."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from populace.population.experience.events import LogEvent, Trajectory
from populace.population.experience.sealing import LoggedEvent
from populace.population.experience.segments import Row
from populace.storage.log.records import Compaction, Position
from populace.storage.lru import Lru

_OVERHEAD_BYTES = 300
"""Memory of a cached segment besides its bytes."""
_EVENT_BYTES = 1500
"""Memory of an opened event besides its text, about."""


class SegmentCache:
    """The newest segments read, up to a number of bytes: a wave mostly takes what has just come in.
    As they are stored, because an Arrow table of a few rows takes several times the memory."""

    def __init__(self, max_bytes: int) -> None:
        self._segments = Lru[tuple[int, int]](max_bytes)
        self._bodies: dict[tuple[int, int], bytes] = {}

    def put(self, partition: int, segment: int, body: bytes) -> None:
        """Keep a segment's bytes; the oldest go."""
        self._bodies[partition, segment] = body
        for gone in self._segments.put((partition, segment), len(body) + _OVERHEAD_BYTES):
            del self._bodies[gone]

    def get(self, partition: int, segment: int) -> bytes | None:
        """A segment's bytes, if they are still here."""
        return self._bodies.get((partition, segment))


class EventCache:
    """Events as they were opened when they came in, until a wave takes them: so that each is
    decrypted and parsed once. Up to a number of bytes, estimated."""

    def __init__(self, max_bytes: int) -> None:
        self._places = Lru[tuple[int, Position]](max_bytes)
        self._events: dict[tuple[int, Position], LoggedEvent] = {}

    def put(self, partition: int, logged: LoggedEvent, num_bytes: int) -> None:
        """Keep an event whose sealed row has `num_bytes`; the oldest go."""
        num_bytes += _numbers_bytes(logged.event)
        place = (partition, logged.ref.position)
        self._events[place] = logged
        for gone in self._places.put(place, num_bytes + _EVENT_BYTES):
            del self._events[gone]

    def take(self, partition: int, position: Position) -> LoggedEvent | None:
        """An event, which is not kept any longer; None if it isn't here."""
        self._places.drop((partition, position))
        return self._events.pop((partition, position), None)

    def forget(self, partition: int, pseudonym: str | None = None) -> None:
        """Drop the events of a user, or of a whole partition."""
        for place, logged in list(self._events.items()):
            if place[0] == partition and pseudonym in (None, logged.pseudonym):
                self.take(*place)


def _numbers_bytes(event: LogEvent) -> int:
    """Memory of an event's numbers, which as Python's objects take many times what JSON does: 36
    bytes a token id, 32 a log-probability, 64 a list and 8 an expert id in it."""
    if not isinstance(event, Trajectory):
        return 0
    num_bytes = 36 * len(event.completion_ids) + 32 * len(event.logprobs)
    if len(event.expert_ids):
        layers = event.expert_ids[0]
        per_token = 64 + len(layers) * (64 + 8 * len(layers[0]) if layers else 0)
        num_bytes += len(event.expert_ids) * per_token
    return num_bytes


class Snapshot:
    """What a compaction kept, by position."""

    def __init__(self, compaction: Compaction, tables: list[pa.Table]) -> None:
        """`tables`: the events kept, and the memory of event ids (`EventMemory.dump`)."""
        self.compaction, self.tables = compaction, tables
        segment, row = (tables[0].column(name).to_numpy() for name in ("segment", "row"))
        self._places = _packed(segment, row)

    def row(self, position: Position) -> Row:
        """The event at a position that the snapshot has."""
        place = _packed(np.array([position[0]]), np.array([position[1]]))[0]
        number = int(np.searchsorted(self._places, place))
        is_there = number < len(self._places) and self._places[number] == place
        assert is_there, f"{position} is not in the snapshot"
        return row_at(self.tables[0], number)


def row_at(table: pa.Table, number: int) -> Row:
    """One row of a segment or of a snapshot's events, as `Seals.open` takes it."""
    return {name: table.column(name)[number].as_py() for name in ("pseudonym", "tag", "sealed")}


def _packed(segment: NDArray[np.integer], row: NDArray[np.integer]) -> NDArray[np.uint64]:
    return (segment.astype(np.uint64) << np.uint64(32)) | row.astype(np.uint64)
