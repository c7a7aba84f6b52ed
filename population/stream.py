"""Durable enqueue and ordered consumption: one experience log per partition.

Producers race for the next number: a loser goes on to the next free one and never reads a body. A segment is
one Arrow IPC stream of `SCHEMA`: whose event it is stands there as a pseudonym, what it is only encrypted.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import json
import logging
import random
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from populace.population.experience import (
    Command,
    LogEvent,
    Task,
    UserId,
    decode_event,
    encode_event,
    is_held_out,
)
from populace.storage.catalog import Catalog
from populace.storage.errors import AlreadyExists, Damaged, Forgotten, OutcomeUnknown, StoreUnavailable
from populace.storage.keys import UserKeys
from populace.storage.log import Log
from populace.storage.manifest import canonical_json
from populace.storage.objects import ObjectStore
from populace.storage.records import EventRef, SettledEvent

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        pa.field("pseudonym", pa.string(), nullable=False),
        pa.field("tag", pa.string(), nullable=False),  # keyed hash of the event id
        pa.field("sealed", pa.binary(), nullable=False),  # the event, encrypted with its user's key
    ]
)
"""One row per event; rows of one segment keep the order in which they were enqueued."""

Row = dict[str, str | bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedEvent:
    """An event at its place in the log."""

    user: UserId
    pseudonym: str
    event: LogEvent
    ref: EventRef


class Seals:
    """Turns events into rows that only holders of the keys can read, and back."""

    def __init__(self, keys: UserKeys, pseudonym_key: bytes) -> None:
        self.keys = keys
        self._key = pseudonym_key

    def seal(self, pseudonym: str, event: LogEvent) -> Row:
        """A row of `SCHEMA`; the user's key must be there."""
        plain, tag = canonical_json(encode_event(event)), self.tag(pseudonym, event.event_id)
        return {"pseudonym": pseudonym, "tag": tag, "sealed": self.keys.seal(pseudonym, plain, f"event/{tag}")}

    def open(self, row: Row, position: tuple[int, int]) -> LoggedEvent:
        """The event in a row; `Forgotten` when its user was."""
        pseudonym, tag, sealed = str(row["pseudonym"]), str(row["tag"]), row["sealed"]
        assert isinstance(sealed, bytes)
        plain = self.keys.open(pseudonym, sealed, f"event/{tag}")
        # Keyed, so that nobody without the key can test a guess at what the user said.
        digest = hmac.new(self._key, plain, hashlib.sha256).hexdigest()
        return LoggedEvent(
            user=UserId(self.keys.get(pseudonym).user),
            pseudonym=pseudonym,
            event=decode_event(json.loads(plain)),
            ref=EventRef(tag=tag, position=position, digest=digest),
        )

    def settled(self, logged: LoggedEvent, reason: str) -> SettledEvent:
        """Why an event ends without being trained on. What stands behind a line break came from the user's words or
        code, and goes into the log sealed only."""
        public, _, said = reason.partition("\n")
        detail = b"" if not said else self.keys.seal(logged.pseudonym, said.encode(), f"detail/{logged.ref.tag}")
        return SettledEvent(event=logged.ref, reason=public, detail=base64.b64encode(detail).decode())

    def detail(self, pseudonym: str, settled: SettledEvent) -> str:
        """What was sealed."""
        sealed = base64.b64decode(settled.detail)
        return self.keys.open(pseudonym, sealed, f"detail/{settled.event.tag}").decode() if sealed else ""

    def tag(self, pseudonym: str, event_id: str) -> str:
        """The name under which an event stands in the logs: 128 bits of a keyed hash, hex."""
        return hmac.new(self._key, f"{pseudonym}/{event_id}".encode(), hashlib.sha256).hexdigest()[:32]


class ExperienceLog:
    """One partition's stream."""

    def __init__(self, store: ObjectStore, population: str, partition: int) -> None:
        self.log = Log(store, f"{population}/experience/{partition}", ".arrow")
        self._hint = 0

    def append(self, rows: Sequence[Row]) -> int:
        """Make rows of `SCHEMA` (see `Seals`) durable as one segment and return its number."""
        attempt_id = uuid.uuid4().hex
        table = pa.Table.from_pylist(list(rows), schema=SCHEMA.with_metadata({"attempt_id": attempt_id}))
        body = _encode(table)
        unknown_seq: int | None = None
        num_unknown = 0
        while True:
            try:
                seq = self._hint = self.log.next_after(self._hint) if unknown_seq is None else unknown_seq
                try:
                    self.log.append_at(seq, body)
                    return seq
                except AlreadyExists:
                    if seq == unknown_seq and self._is_mine(seq, attempt_id):
                        return seq
                    unknown_seq = None
                except (OutcomeUnknown, StoreUnavailable):
                    # The same number again: only then is it certain who occupies it.
                    unknown_seq = seq
                    raise
            except (OutcomeUnknown, StoreUnavailable) as error:
                num_unknown += 1
                if num_unknown > 8:
                    raise OutcomeUnknown(
                        f"{self.log.prefix}: the store did not say whether these events were written ({error}); send "
                        "them again with the same event ids when it is reachable"
                    ) from error
                time.sleep(random.uniform(0.0, 0.05 * 2**num_unknown))

    def read_from(self, segment: int) -> Iterator[tuple[int, list[Row]]]:
        """Segments from `segment` on, each with its rows in order; `Damaged` for one that isn't what was written."""
        for seq, body in self.log.read_from(segment):
            yield seq, _decode(self.log.key(seq), body).to_pylist()

    def _is_mine(self, seq: int, attempt_id: str) -> bool:
        body = self.log.read(seq)
        if body is None:
            return False
        return bool(_decode(self.log.key(seq), body).schema.metadata[b"attempt_id"] == attempt_id.encode())


def _encode(table: pa.Table) -> bytes:
    """An Arrow IPC stream, and behind its end, where Arrow's readers don't look, its sha256."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    body: bytes = sink.getvalue().to_pybytes()
    return body + hashlib.sha256(body).digest()


def _decode(key: str, body: bytes) -> pa.Table:
    # The digest first: some flipped bytes crash Arrow's reader instead of failing it.
    if hashlib.sha256(body[:-32]).digest() != body[-32:]:
        raise Damaged(f"{key} is not what was written; restore it from a copy")
    return pa.ipc.open_stream(body[:-32]).read_all()


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
        self.commands: list[LoggedEvent] = []
        self.next_segment: dict[int, int] = {}
        self._heldout_key = heldout_key
        self._heldout_share = heldout_share
        self._seen: dict[tuple[str, str], str] = {}
        self._turns = itertools.count()

    def observe(self, log: ExperienceLog, partition: int, catalog: Catalog, seals: Seals) -> int:
        """Read what is new; returns the number of events. What forgotten users sent can't be read any more."""
        num_events = 0
        for seq, rows in log.read_from(self.next_segment.get(partition, 0)):
            for index, row in enumerate(rows):
                try:
                    logged = seals.open(row, (seq, index))
                except Forgotten:
                    continue
                except Damaged as error:  # of one user; everybody else goes on
                    logger.error("%s, row %d, is passed over: %s", log.log.key(seq), index, error)
                    continue
                self._add(logged, partition, catalog)
                num_events += 1
            self.next_segment[partition] = seq + 1
        return num_events

    def forget(self, pseudonym: str) -> None:
        """Drop everything of a user."""
        self.queues.pop(pseudonym, None)
        self.commands = [logged for logged in self.commands if logged.pseudonym != pseudonym]

    def trim(self, catalog: Catalog) -> None:
        """Drop consumed events and obeyed commands."""
        waiting = [queue for queue in self.queues.values() if queue.is_waiting]
        for queue, consumed in zip(waiting, catalog.consumed_of([q.pseudonym for q in waiting]), strict=True):
            before = len(queue.pending) + len(queue.rejected)
            queue.pending = [item for item in queue.pending if item.ref.position > consumed]
            queue.rejected = [item for item in queue.rejected if item[0].ref.position > consumed]
            if len(queue.pending) + len(queue.rejected) < before:
                queue.waiting_since = next(self._turns)
        self.commands = [logged for logged in self.commands if (logged.pseudonym, logged.ref.tag) not in catalog.obeyed]

    def num_pending(self) -> int:
        return sum(len(queue.pending) for queue in self.queues.values())

    def _add(self, logged: LoggedEvent, partition: int, catalog: Catalog) -> None:
        pseudonym = logged.pseudonym
        if catalog.is_forgotten(pseudonym):
            return  # the tombstone is there, the key not yet gone
        queue = self.queues.get(pseudonym)
        if queue is None:
            queue = self.queues[pseudonym] = UserQueue(user=logged.user, pseudonym=pseudonym, partition=partition)
        if not queue.is_waiting:
            queue.waiting_since = next(self._turns)
        consumed = logged.ref.position <= catalog.consumed_of([pseudonym])[0]
        identity = (pseudonym, logged.ref.tag)
        if (first_digest := self._seen.get(identity)) is not None:
            if first_digest != logged.ref.digest and not consumed:
                queue.rejected.append((logged, "event id reused with other content"))
            return
        self._seen[identity] = logged.ref.digest
        match logged.event:
            case _ if isinstance(logged.event, Command):
                if identity not in catalog.obeyed:
                    self.commands.append(logged)
            case Task() if is_held_out(logged.event.event_id, self._heldout_key, self._heldout_share):
                queue.heldout.append(logged)
            case _ if not consumed:
                queue.pending.append(logged)
