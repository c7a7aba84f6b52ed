"""The experience log of a partition: durable appends by many writers, ordered reading, a floor.

Producers race for the next number: a loser goes on to the next free one and never reads a body, a
winner rests in proportion to its collisions, so that nobody starves. A segment is one Arrow IPC
stream of `SCHEMA`: whose event it is stands there as a pseudonym, what it is only encrypted.
"""

from __future__ import annotations

import contextlib
import random
import time
import uuid
from collections.abc import Iterator, Sequence

import pyarrow as pa

from populace.population.experience.segments import Row, decode_rows, encode_rows
from populace.storage import paths
from populace.storage.errors import AlreadyExists, ObjectNotFound, OutcomeUnknown, StoreUnavailable
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.log import Log

MAX_UNKNOWN = 8
"""Times that an append is tried whose outcome the store doesn't tell."""


class ExperienceLog:
    """One partition's stream.

    The log grows at one end and is cut at the other: the owner replaces what it has consumed by a
    snapshot and raises the `floor`. A floor is an object that is created once, at the floor before
    it, so that it can only rise."""

    def __init__(self, store: ObjectStore, population: str, partition: int) -> None:
        self.log = Log(store, paths.experience_folder(population, partition), ".arrow")
        self._floors = paths.floor_folder(population, partition)
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
                # Whatever fails from here on: the segment is there, and must not get a second
                # number.
                self._next, unknown_seq = seq + 1, seq
                if seq >= self.floor():
                    took_s = time.monotonic() - started
                    self._rest_until = started + took_s * (
                        1 + num_collisions * random.uniform(0.5, 1.0)
                    )
                    return seq
                # Nobody reads there any more: the segment with that number was already deleted.
                self.log.store.delete(self.log.key(seq))
                unknown_seq, self._next = None, None
            except (OutcomeUnknown, StoreUnavailable) as error:
                num_unknown += 1
                if num_unknown > MAX_UNKNOWN:
                    raise OutcomeUnknown(
                        f"{self.log.prefix}: the store did not say whether these events were "
                        f"written ({error}); send "
                        "them again with the same event ids when it is reachable"
                    ) from error
                time.sleep(random.uniform(0.0, 0.05 * 2**num_unknown))

    def read_from(self, segment: int) -> Iterator[tuple[int, pa.Table]]:
        """Segments from `segment` on, each with its rows in order; `Damaged` for one that isn't
        what was written."""
        for seq, body in self.log.read_from(segment):
            yield seq, decode_rows(self.log.key(seq), body)

    def floor(self) -> int:
        """The first segment that still counts. Also what a fresh producer starts from."""
        while (raised := self._raised(self._floor)) is not None:
            self._floor = raised
        return self._floor

    def raise_floor(self, old: int, new: int) -> None:
        """Say that everything below `new` is in a snapshot that a record names; `old` is the floor
        so far."""
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
        return bool(
            decode_rows(self.log.key(seq), body).schema.metadata[b"attempt_id"]
            == attempt_id.encode()
        )
