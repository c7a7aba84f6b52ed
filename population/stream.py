"""Durable enqueue and ordered consumption: one experience log per partition.

Producers race for the next number: a loser goes on to the next free one and never reads a body. A segment is
one Arrow IPC stream of `experience.SCHEMA`.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from populace.population.experience import (
    SCHEMA,
    LogEvent,
    Rollback,
    Task,
    UserId,
    decode_event,
    digest_of_row,
    is_held_out,
)
from populace.storage.catalog import Catalog
from populace.storage.errors import AlreadyExists, OutcomeUnknown
from populace.storage.log import Log
from populace.storage.manifest import EventRef
from populace.storage.objects import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedEvent:
    """An event at its place in the log."""

    user: UserId
    event: LogEvent
    ref: EventRef


class ExperienceLog:
    """One partition's stream."""

    def __init__(self, store: ObjectStore, population: str, partition: int) -> None:
        self.log = Log(store, f"{population}/experience/{partition}", ".arrow")
        self._hint = 0

    def append(self, rows: Sequence[dict[str, str]]) -> int:
        """Make rows of `SCHEMA` (see `encode_event`) durable as one segment and return its number."""
        attempt_id = uuid.uuid4().hex
        table = pa.Table.from_pylist(list(rows), schema=SCHEMA.with_metadata({"attempt_id": attempt_id}))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        body = sink.getvalue().to_pybytes()
        unknown_tries = 0
        while True:
            seq = self._hint = self.log.next_after(self._hint)
            try:
                self.log.append_at(seq, body)
                return seq
            except AlreadyExists:
                if unknown_tries and self._is_mine(seq, attempt_id):
                    return seq
            except OutcomeUnknown:
                # The same number again: only then is it certain who occupies it.
                unknown_tries += 1
                if unknown_tries > 8:
                    raise
                time.sleep(random.uniform(0.0, 0.1 * 2**unknown_tries))
                if self._is_mine(seq, attempt_id):
                    return seq

    def read_from(self, segment: int) -> Iterator[tuple[int, list[LoggedEvent]]]:
        """Segments from `segment` on, each with its events in order."""
        for seq, body in self.log.read_from(segment):
            table = pa.ipc.open_stream(body).read_all()
            rows = table.to_pylist()
            yield (
                seq,
                [
                    LoggedEvent(
                        user=UserId(row["user"]),
                        event=decode_event(row),
                        ref=EventRef(event_id=row["event_id"], position=(seq, index), digest=digest_of_row(row)),
                    )
                    for index, row in enumerate(rows)
                ],
            )

    def _is_mine(self, seq: int, attempt_id: str) -> bool:
        body = self.log.read(seq)
        if body is None:
            return False
        metadata = pa.ipc.open_stream(body).schema.metadata or {}
        return metadata.get(b"attempt_id") == attempt_id.encode()


def partition_of(user: str, partitions: int) -> int:
    """The fixed partition of a user."""
    return int.from_bytes(hashlib.blake2b(user.encode(), digest_size=8).digest(), "big") % partitions


@dataclass(slots=True, kw_only=True)
class UserQueue:
    """What one user has in the log beyond the consumed position."""

    user: UserId
    pseudonym: str
    partition: int
    pending: list[LoggedEvent] = field(default_factory=list)
    heldout: list[LoggedEvent] = field(default_factory=list)
    rejected: list[tuple[LoggedEvent, str]] = field(default_factory=list)
    """Events that can't be trained on, with the reason; they settle with the user's next wave."""
    waiting_since: int = 0
    """Turn of the index at which the user got into the line; who is served and has more gets in again at its end."""

    @property
    def is_waiting(self) -> bool:
        return bool(self.pending or self.rejected)


class PendingIndex:
    """Who has what to learn from: the experience logs minus what the revision logs say is consumed.

    Derived state. `observe` reads on in the log; `trim` forgets what the catalog says is consumed.
    """

    def __init__(self, heldout_key: bytes, heldout_share: float) -> None:
        self.queues: dict[str, UserQueue] = {}
        self.commands: list[tuple[str, LoggedEvent]] = []
        self.next_segment: dict[int, int] = {}
        self._heldout_key = heldout_key
        self._heldout_share = heldout_share
        self._seen: dict[tuple[str, str], str] = {}
        self._turns = itertools.count()

    def observe(self, log: ExperienceLog, partition: int, catalog: Catalog, pseudonym_of: Callable[[str], str]) -> int:
        """Read what is new; returns the number of events."""
        num_events = 0
        for seq, events in log.read_from(self.next_segment.get(partition, 0)):
            for logged in events:
                self._add(logged, partition, catalog, pseudonym_of(logged.user))
                num_events += 1
            self.next_segment[partition] = seq + 1
        return num_events

    def trim(self, catalog: Catalog) -> None:
        """Drop consumed events and obeyed commands."""
        for queue in self.queues.values():
            if (adapter := catalog.get(queue.pseudonym)) is not None:
                consumed, before = adapter.consumed, len(queue.pending) + len(queue.rejected)
                queue.pending = [item for item in queue.pending if item.ref.position > consumed]
                queue.rejected = [item for item in queue.rejected if item[0].ref.position > consumed]
                if len(queue.pending) + len(queue.rejected) < before:
                    queue.waiting_since = next(self._turns)
        self.commands = [
            (pseudonym, logged)
            for pseudonym, logged in self.commands
            if (pseudonym, logged.ref.event_id) not in catalog.obeyed
        ]

    def num_pending(self) -> int:
        return sum(len(queue.pending) for queue in self.queues.values())

    def _add(self, logged: LoggedEvent, partition: int, catalog: Catalog, pseudonym: str) -> None:
        queue = self.queues.get(pseudonym)
        if queue is None:
            queue = self.queues[pseudonym] = UserQueue(user=logged.user, pseudonym=pseudonym, partition=partition)
        if not queue.is_waiting:
            queue.waiting_since = next(self._turns)
        adapter = catalog.get(pseudonym)
        consumed = adapter is not None and logged.ref.position <= adapter.consumed
        identity = (pseudonym, logged.ref.event_id)
        if (first_digest := self._seen.get(identity)) is not None:
            if first_digest != logged.ref.digest and not consumed:
                queue.rejected.append((logged, "event id reused with other content"))
            return
        self._seen[identity] = logged.ref.digest
        match logged.event:
            case Rollback():
                if (pseudonym, logged.ref.event_id) not in catalog.obeyed:
                    self.commands.append((pseudonym, logged))
            case Task() if is_held_out(logged.event.event_id, self._heldout_key, self._heldout_share):
                queue.heldout.append(logged)
            case _ if not consumed:
                queue.pending.append(logged)
