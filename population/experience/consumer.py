"""The reading end of a partition's experience: what is new, what is a repetition, and what can be
cut off behind it.

    segments -> seen before? -> held out, pending, or a command -> PendingIndex
    PendingIndex -> snapshot -> `compaction` record -> floor raised -> old segments deleted

A snapshot holds the events below the floor that wait or are held out, and the memory of event ids:
opening reads it and the segments behind it, never the whole history.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from populace.population.experience.events import Command, LogEvent, Task, UserId, is_held_out
from populace.population.experience.log import ExperienceLog
from populace.population.experience.memory import EventMemory
from populace.population.experience.pending import CLASH, HELD, OUT_OF_ORDER, PENDING, PendingIndex
from populace.population.experience.sealing import LoggedEvent, Seals
from populace.population.experience.segments import checked, decode_rows, enqueued_at, with_digest
from populace.population.experience.snapshot import (
    Payload,
    SegmentCache,
    Snapshot,
    payload_at,
    row_from,
)
from populace.storage.catalog.catalog import Catalog
from populace.storage.errors import Damaged, Forgotten, ObjectNotFound
from populace.storage.identity import PopulationMeta
from populace.storage.log.records import Compaction, Position

logger = logging.getLogger(__name__)

COMMAND = 5
"""State of a command in a snapshot; beside those of `pending.py`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a process looks at experience."""

    cache_bytes: int = 64_000_000
    """Of segments kept in memory."""
    price: Callable[[LogEvent], int] = lambda event: 1
    """Estimated tokens of an event."""
    events_per_update: int = 1
    rank: int = 0
    """Of the adapters that new users get."""
    user_ranks: Mapping[str, int] = field(default_factory=dict)
    """Users whose adapters get another one."""
    tenants: tuple[str, ...] = ()
    """A user `NAME/…` belongs to tenant NAME if it is one of these, else to the default one."""

    def tenant(self, user: UserId) -> int:
        """Number of a user's tenant; 0 is the default."""
        name, slash, _ = user.partition("/")
        return self.tenants.index(name) + 1 if slash and name in self.tenants else 0


class Consumer:
    """Follows one partition's experience log into a `PendingIndex`."""

    def __init__(
        self,
        log: ExperienceLog,
        partition: int,
        seals: Seals,
        index: PendingIndex,
        cache: SegmentCache,
        meta: PopulationMeta,
        reading: Reading,
    ) -> None:
        self.log, self.partition, self.seals = log, partition, seals
        self.index, self.cache, self.reading = index, cache, reading
        self._heldout_key, self._heldout_share = meta.heldout_key(), meta.heldout_share
        self.next_segment = 0
        self.commands: list[LoggedEvent] = []
        self.memory = EventMemory()
        self._snapshot: Snapshot | None = None
        self._num_read = 0
        """Events since the last snapshot."""

    def observe(self, catalog: Catalog) -> int:
        """Read what is new; returns the number of events. What forgotten users sent can't be read
        any more."""
        compaction = catalog.compactions.get(self.partition)
        if compaction is not None and compaction.floor > self.next_segment:
            self._start_from(self._read_snapshot(compaction), catalog)
        num_events = 0
        for seq, body in self.log.log.read_from(self.next_segment):
            self.cache.put(self.partition, seq, body)
            num_events += self._take_in(seq, decode_rows(self.log.log.key(seq), body), catalog)
            self.next_segment = seq + 1
        self._num_read += num_events
        return num_events

    def load(self, positions: Sequence[Position], catalog: Catalog) -> dict[Position, LoggedEvent]:
        """The events at these places; those of forgotten users are left out."""
        events = {}
        for position, payload in self._payloads(positions, catalog).items():
            with contextlib.suppress(Forgotten):
                events[position] = self.seals.open(row_from(*payload), position)
        return events

    def forget(self, pseudonym: str) -> None:
        """Drop everything of a user."""
        self.index.forget(pseudonym)
        self.commands = [logged for logged in self.commands if logged.pseudonym != pseudonym]

    def let_go(self) -> None:
        """Forget what was read: another process has the partition now."""
        self.index.clear_partition(self.partition)
        self.next_segment, self.commands, self.memory, self._snapshot = (
            0,
            [],
            EventMemory(self.memory.horizon),
            None,
        )
        self._num_read = 0

    # Compaction; the partition's owner alone.

    def is_worth_a_snapshot(self) -> bool:
        """Whether at least as much was read since the last one as has to be copied: a backlog isn't
        copied for ever."""
        return self._num_read >= self.index.num_kept(self.partition)

    def write_snapshot(self, catalog: Catalog) -> Compaction:
        """Save what is still needed of everything read so far. Nothing depends on it until its
        record is there."""
        floor, alive = self.next_segment, self.index.survivors(self.partition, self.next_segment)
        positions = list(zip(alive.segment.tolist(), alive.row.tolist(), strict=True))
        entries = list(zip(positions, alive.state.tolist(), alive.tokens.tolist(), strict=True))
        entries += [(logged.ref.position, COMMAND, 0) for logged in self.commands]
        entries.sort()
        found = self._payloads([position for position, _, _ in entries], catalog)
        payloads = [found[position] for position, _, _ in entries]
        table = pa.table({
            "pseudonym": pa.array([item[0] for item in payloads], pa.string()),
            "tag": pa.array([item[1] for item in payloads], pa.string()),
            "sealed": pa.array([item[2] for item in payloads], pa.binary()),
            "segment": pa.array([position[0] for position, _, _ in entries], pa.uint32()),
            "row": pa.array([position[1] for position, _, _ in entries], pa.uint32()),
            "state": pa.array([state for _, state, _ in entries], pa.uint8()),
            "tokens": pa.array([tokens for _, _, tokens in entries], pa.uint32()),
        })  # fmt: skip
        body = with_digest([table, *self.memory.dump()])
        key = f"{self.log.log.prefix.replace('/experience/', '/snapshots/')}/{floor:020d}-{uuid.uuid4().hex[:8]}.arrow"
        self.log.log.store.put(key, body)
        before = catalog.compactions.get(self.partition)
        compaction = Compaction(
            previous=0 if before is None else before.floor, floor=floor, snapshot=key,
            sha256=hashlib.sha256(body).hexdigest(),
        )  # fmt: skip
        self._snapshot, self._num_read = Snapshot(compaction, [table]), 0
        return compaction

    def finish_compaction(self, now: Compaction) -> None:
        """Raise the floor that the record names, and delete what lies below it. Repeated by the
        next owner if this one dies in it."""
        self.log.raise_floor(now.previous, now.floor)
        self.log.delete_below(now.floor)
        folder = now.snapshot.rpartition("/")[0]
        for key in list(self.log.log.store.list(folder)):
            if (
                key < now.snapshot
            ):  # never a newer one: this may be an owner that was fenced meanwhile
                self.log.log.store.delete(key)

    def _payloads(self, positions: Sequence[Position], catalog: Catalog) -> dict[Position, Payload]:
        """What lies at these places, segment by segment."""
        compaction = catalog.compactions.get(self.partition)
        found: dict[Position, Payload] = {}
        by_segment: dict[int, list[int]] = {}
        for segment, row in positions:
            by_segment.setdefault(segment, []).append(row)
        for segment, rows in by_segment.items():
            if compaction is not None and segment < compaction.floor:
                if self._snapshot is None or self._snapshot.compaction != compaction:
                    self._snapshot = self._read_snapshot(compaction)
                found |= {(segment, row): self._snapshot.payload((segment, row)) for row in rows}
                continue
            key, body = self.log.log.key(segment), self.cache.get(self.partition, segment)
            if body is None:
                body = self.log.log.store.get(key)
                self.cache.put(self.partition, segment, body)
            table = decode_rows(key, body)
            found |= {(segment, row): payload_at(table, row) for row in rows}
        return found

    def _read_snapshot(self, compaction: Compaction) -> Snapshot:
        body = self.log.log.store.get(compaction.snapshot)
        if hashlib.sha256(body).hexdigest() != compaction.sha256:
            raise Damaged(
                f"{compaction.snapshot} is not what its record vouches for; restore it from a copy"
            )
        source, tables = pa.BufferReader(checked(compaction.snapshot, body)), []
        for _ in range(4):
            tables.append(pa.ipc.open_stream(source).read_all())
        return Snapshot(compaction, tables)

    def _start_from(self, snapshot: Snapshot, catalog: Catalog) -> None:
        """Take a snapshot for everything below its floor."""
        self.let_go()
        table = snapshot.tables[0]
        names = table.column("pseudonym").to_pylist()
        unique = list(dict.fromkeys(names))
        consumed = dict(zip(unique, catalog.consumed_of(unique), strict=True)) if unique else {}
        places = zip(
            *(table.column(name).to_pylist() for name in ("segment", "row", "state", "tokens")),
            strict=True,
        )
        for number, (name, (segment, row, state, tokens)) in enumerate(
            zip(names, places, strict=True)
        ):
            position = (segment, row)
            if catalog.is_forgotten(name):
                continue
            if state == COMMAND:
                logged = self._open(row_from(*payload_at(table, number)), position)
                if logged is not None and (name, logged.ref.tag) not in catalog.obeyed:
                    self.commands.append(logged)
            elif state == HELD or position > consumed[name]:
                with contextlib.suppress(Forgotten):  # the key is gone, the tombstone not read yet
                    self.index.add(self._user(name, catalog), position, state, tokens, 0.0)
        self.memory = EventMemory.load(snapshot.tables[1:], self.memory.horizon)
        self._snapshot, self.next_segment = snapshot, snapshot.compaction.floor

    def _take_in(self, seq: int, table: pa.Table, catalog: Catalog) -> int:
        """One segment's events into the index; returns how many could be read."""
        rows = table.to_pylist()
        opened = [self._open(row, (seq, number)) for number, row in enumerate(rows)]
        logged_events = [logged for logged in opened if logged is not None]
        if not logged_events:
            return 0
        tags = [logged.ref.tag for logged in logged_events]
        known = dict(zip(tags, self.memory.find(tags).tolist(), strict=True))
        consumed = catalog.consumed_of([logged.pseudonym for logged in logged_events])
        arrived_at = enqueued_at(table)
        new: dict[str, int] = {}
        for logged, limit in zip(logged_events, consumed, strict=True):
            digest = int(logged.ref.digest[:16], 16) or 1
            if (first := known[logged.ref.tag]) or (first := new.get(logged.ref.tag, 0)):
                if first != digest and logged.ref.position > limit:
                    self._add(logged, CLASH, catalog, arrived_at)
                continue
            new[logged.ref.tag] = digest
            if logged.sequence is not None:
                if logged.sequence <= self.memory.highest(logged.pseudonym):
                    # Not remembered, though all is: it came late. Else it is a repetition from
                    # before the memory.
                    if not self.memory.has_forgotten and logged.ref.position > limit:
                        self._add(logged, OUT_OF_ORDER, catalog, arrived_at)
                    continue
                self.memory.raise_highest(logged.pseudonym, logged.sequence)
            self._sort(logged, logged.ref.position <= limit, catalog, arrived_at)
        if new:
            self.memory.add(list(new), list(new.values()))
        return len(logged_events)

    def _sort(
        self, logged: LoggedEvent, is_consumed: bool, catalog: Catalog, arrived_at: float
    ) -> None:
        """Where a new event belongs."""
        if catalog.is_forgotten(logged.pseudonym):
            return  # the tombstone is there, the key not yet gone
        event = logged.event
        if isinstance(event, Command):
            if (logged.pseudonym, logged.ref.tag) not in catalog.obeyed:
                self.commands.append(logged)
        elif isinstance(event, Task) and is_held_out(
            logged.event_id, self._heldout_key, self._heldout_share
        ):
            self._add(logged, HELD, catalog, arrived_at)
        elif not is_consumed:
            self._add(logged, PENDING, catalog, arrived_at)

    def _add(self, logged: LoggedEvent, state: int, catalog: Catalog, arrived_at: float) -> None:
        tokens = self.reading.price(logged.event) if state == PENDING else 0
        self.index.add(
            self._user(logged.pseudonym, catalog), logged.ref.position, state, tokens, arrived_at
        )

    def _user(self, pseudonym: str, catalog: Catalog) -> int:
        row = self.index.row_of(pseudonym)
        if row is not None:
            return row
        adapter, reading = catalog.get(pseudonym), self.reading
        tenant, rank = 0, reading.rank if adapter is None else adapter.spec["rank"]
        if reading.tenants or (adapter is None and reading.user_ranks):  # a name costs a request
            user = UserId(self.seals.keys.get(pseudonym).user)
            tenant = reading.tenant(user)
            rank = reading.user_ranks.get(user, rank) if adapter is None else rank
        return self.index.add_user(pseudonym, self.partition, tenant, rank)

    def _open(self, row: Mapping[str, str | bytes], position: Position) -> LoggedEvent | None:
        try:
            return self.seals.open(row, position)
        except Forgotten:
            return None
        except (Damaged, ObjectNotFound) as error:  # of one user; everybody else goes on
            logger.error(
                "%s, row %d, is passed over: %s", self.log.log.key(position[0]), position[1], error
            )
            return None
