"""Durable enqueue and ordered consumption: one experience log per partition.

Producers race for the next number: a loser goes on to the next free one and never reads a body, a winner rests in
proportion to its collisions, so that nobody starves. A segment is one Arrow IPC stream of `SCHEMA`: whose event it is
stands there as a pseudonym, what it is only encrypted.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from populace.population.experience import LogEvent, UserId, decode_event
from populace.storage.errors import AlreadyExists, Damaged, ObjectNotFound, OutcomeUnknown, StoreUnavailable
from populace.storage.keys.user_keys import UserKeys
from populace.storage.log.records import EventRef, SettledEvent
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.log import Log

MAX_UNKNOWN = 8
"""Times that an append is tried whose outcome the store doesn't tell."""

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
    sequence: int | None = None
    """The event id, where it is an integer."""

    @property
    def event_id(self) -> str:
        return str(self.event.event_id)


class Seals:
    """Turns events into rows that only holders of the keys can read, and back."""

    def __init__(self, keys: UserKeys, pseudonym_key: bytes) -> None:
        self.keys = keys
        self._key = pseudonym_key

    def seal(self, pseudonym: str, event_id: str, plain: bytes) -> Row:
        """A row of `SCHEMA` from an event's bytes (`event_bytes`); the user's key must be there."""
        tag = self.tag(pseudonym, event_id)
        return {"pseudonym": pseudonym, "tag": tag, "sealed": self.keys.seal(pseudonym, plain, f"event/{tag}")}

    def open(self, row: Mapping[str, str | bytes], position: tuple[int, int]) -> LoggedEvent:
        """The event in a row; `Forgotten` when its user was."""
        pseudonym, tag, sealed = str(row["pseudonym"]), str(row["tag"]), row["sealed"]
        assert isinstance(sealed, bytes)
        plain = self.keys.open(pseudonym, sealed, f"event/{tag}")
        # Keyed, so that nobody without the key can test a guess at what the user said.
        digest = hmac.digest(self._key, plain, "sha256").hex()
        encoded = json.loads(plain)
        return LoggedEvent(
            user=UserId(self.keys.get(pseudonym).user),
            pseudonym=pseudonym,
            event=decode_event(encoded),
            ref=EventRef(tag=tag, position=position, digest=digest),
            sequence=encoded["event_id"] if isinstance(encoded["event_id"], int) else None,
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
        return hmac.digest(self._key, f"{pseudonym}/{event_id}".encode(), "sha256").hex()[:32]


class ExperienceLog:
    """One partition's stream.

    The log grows at one end and is cut at the other: the owner replaces what it has consumed by a snapshot and raises
    the `floor`. A floor is an object that is created once, at the floor before it, so that it can only rise."""

    def __init__(self, store: ObjectStore, population: str, partition: int) -> None:
        self.log = Log(store, f"{population}/experience/{partition}", ".arrow")
        self._floors = f"{population}/floors/{partition}"
        self._next: int | None = None
        self._floor = 0
        self._rest_until = 0.0

    def append(self, rows: Sequence[Row]) -> int:
        """Make rows of `SCHEMA` (see `Seals`) durable as one segment and return its number."""
        attempt_id = uuid.uuid4().hex
        body = encode_rows(rows, {"attempt_id": attempt_id, "enqueued_at": f"{time.time():.3f}"})
        num_unknown = num_collisions = 0
        # Who has just won against others lets them go first, the longer the more of them there are.
        time.sleep(max(0.0, self._rest_until - time.monotonic()))
        unknown_seq: int | None = None
        while True:
            started = time.monotonic()
            try:
                if self._next is None:
                    self._next = self.log.next_after(self.floor())
                seq = self._next if unknown_seq is None else unknown_seq
                try:
                    self.log.append_at(seq, body)
                except AlreadyExists:
                    if seq != unknown_seq or not self._is_mine(seq, attempt_id):
                        unknown_seq, num_collisions = None, num_collisions + 1
                        self._next = self.log.next_after(max(seq + 1, self.floor()))
                        continue
                except (OutcomeUnknown, StoreUnavailable):
                    # The same number again: only then is it certain who occupies it.
                    unknown_seq = seq
                    raise
                # Whatever fails from here on: the segment is there, and must not get a second number.
                self._next, unknown_seq = seq + 1, seq
                if seq >= self.floor():
                    took_s = time.monotonic() - started
                    self._rest_until = started + took_s * (1 + num_collisions * random.uniform(0.5, 1.0))
                    return seq
                # Nobody reads there any more: the segment with that number was already deleted.
                self.log.store.delete(self.log.key(seq))
                unknown_seq, self._next = None, None
            except (OutcomeUnknown, StoreUnavailable) as error:
                num_unknown += 1
                if num_unknown > MAX_UNKNOWN:
                    raise OutcomeUnknown(
                        f"{self.log.prefix}: the store did not say whether these events were written ({error}); send "
                        "them again with the same event ids when it is reachable"
                    ) from error
                time.sleep(random.uniform(0.0, 0.05 * 2**num_unknown))

    def read_from(self, segment: int) -> Iterator[tuple[int, pa.Table]]:
        """Segments from `segment` on, each with its rows in order; `Damaged` for one that isn't what was written."""
        for seq, body in self.log.read_from(segment):
            yield seq, decode_rows(self.log.key(seq), body)

    def floor(self) -> int:
        """The first segment that still counts. Also what a fresh producer starts from."""
        while (raised := self._raised(self._floor)) is not None:
            self._floor = raised
        return self._floor

    def raise_floor(self, old: int, new: int) -> None:
        """Say that everything below `new` is in a snapshot that a record names; `old` is the floor so far."""
        with contextlib.suppress(AlreadyExists):  # an owner before this one did it
            self.log.store.create(self._floor_key(old), str(new).encode())

    def delete_below(self, floor: int) -> None:
        """Remove the segments that nobody reads any more."""
        end = self.log.key(floor)
        for key in self.log.store.list(self.log.prefix):
            if key >= end:
                break
            self.log.store.delete(key)

    def _raised(self, floor: int) -> int | None:
        try:
            return int(self.log.store.get(self._floor_key(floor)))
        except ObjectNotFound:
            return None

    def _floor_key(self, floor: int) -> str:
        return f"{self._floors}/{floor:020d}"

    def _is_mine(self, seq: int, attempt_id: str) -> bool:
        body = self.log.read(seq)
        if body is None:
            return False
        return bool(decode_rows(self.log.key(seq), body).schema.metadata[b"attempt_id"] == attempt_id.encode())


def encode_rows(rows: Sequence[Row], metadata: Mapping[str, str]) -> bytes:
    """An Arrow IPC stream, and behind its end, where Arrow's readers don't look, its sha256."""
    columns = [
        pa.array([row[name] for row in rows], kind) for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)
    ]
    table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(dict(metadata)))
    return with_digest([table])


def with_digest(tables: Sequence[pa.Table]) -> bytes:
    """Arrow IPC streams one after another, and their sha256."""
    sink = pa.BufferOutputStream()
    for table in tables:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    body: bytes = sink.getvalue().to_pybytes()
    return body + hashlib.sha256(body).digest()


def checked(key: str, body: bytes) -> memoryview:
    """What `with_digest` wrote, without the digest; `Damaged` when it isn't that."""
    # The digest first: some flipped bytes crash Arrow's reader instead of failing it.
    inner = memoryview(body)[:-32]
    if hashlib.sha256(inner).digest() != body[-32:]:
        raise Damaged(f"{key} is not what was written; restore it from a copy")
    return inner


def decode_rows(key: str, body: bytes) -> pa.Table:
    return pa.ipc.open_stream(checked(key, body)).read_all()


def enqueued_at(table: pa.Table) -> float:
    """When a segment was written, by its producer's clock, in seconds since 1970. Decides about order of service only,
    never about safety."""
    return float((table.schema.metadata or {}).get(b"enqueued_at", b"0"))


def partition_of(user: str, partitions: int) -> int:
    """The fixed partition of a user."""
    return int.from_bytes(hashlib.blake2b(user.encode(), digest_size=8).digest(), "big") % partitions
