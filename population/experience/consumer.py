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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from populace.configs.schema import Settings
from populace.population.experience.events import (
    Command,
    Task,
    UserId,
    estimate_tokens,
    is_held_out,
)
from populace.population.experience.log import ExperienceLog
from populace.population.experience.memory import EventMemory
from populace.population.experience.pending import PendingIndex
from populace.population.experience.sealing import LoggedEvent, Seals
from populace.population.experience.segments import (
    Row,
    checked,
    decode_rows,
    enqueued_at,
    with_digest,
)
from populace.population.experience.snapshot import EventCache, SegmentCache, Snapshot, row_at
from populace.population.experience.states import EventState
from populace.storage import paths
from populace.storage.catalog.catalog import Catalog
from populace.storage.errors import Damaged, Forgotten, ObjectNotFound
from populace.storage.identity import PopulationMeta
from populace.storage.log.records import Compaction, Position
from populace.storage.objects.contract import ObjectStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the consumers of one process share."""

    store: ObjectStore
    meta: PopulationMeta
    settings: Settings
    seals: Seals
    index: PendingIndex
    segments: SegmentCache
    events: EventCache

    @staticmethod
    def of(store: ObjectStore, meta: PopulationMeta, seals: Seals, settings: Settings) -> Reading:
        """With empty caches and an empty index."""
        cache_bytes = int(settings.stream.cache_mb * 1e6)
        return Reading(
            store=store,
            meta=meta,
            settings=settings,
            seals=seals,
            index=PendingIndex(settings.scheduler.events_per_update),
            segments=SegmentCache(cache_bytes),
            events=EventCache(cache_bytes // 4),
        )

    def tenant(self, user: UserId) -> int:
        """Number of a user's tenant; 0 is the default. A user `NAME/…` belongs to tenant NAME if
        the settings know it."""
        tenants = tuple(self.settings.scheduler.tenants)
        name, slash, _ = user.partition("/")
        return tenants.index(name) + 1 if slash and name in tenants else 0


class Consumer:
    """Follows one partition's experience log into the `PendingIndex`."""

    def __init__(self, partition: int, reading: Reading) -> None:
        self.partition, self.reading = partition, reading
        self.log = ExperienceLog(reading.store, reading.meta.name, partition)
        self.seals, self.index = reading.seals, reading.index
        self._heldout_key = reading.meta.heldout_key()
        self.next_segment = 0
        self.commands: list[LoggedEvent] = []
        self.memory = EventMemory()
        self._snapshot: Snapshot | None = None
        self._num_read = 0
        """Events since the last snapshot."""

    def observe(self, catalog: Catalog) -> int:
        """Read what is new; returns the number of events. What erased users sent can't be read any
        more."""
        compaction = catalog.compactions.get(self.partition)
        if compaction is not None and compaction.floor > self.next_segment:
            self._start_from(self._read_snapshot(compaction), catalog)
        num_events = 0
        for seq, body in self.log.log.read_from(self.next_segment):
            self.reading.segments.put(self.partition, seq, body)
            num_events += self._take_in(seq, decode_rows(self.log.log.key(seq), body), catalog)
            self.next_segment = seq + 1
        self._num_read += num_events
        return num_events

    def load(self, positions: Sequence[Position], catalog: Catalog) -> dict[Position, LoggedEvent]:
        """The events at these places; those of erased users are left out."""
        events = {}
        for position in positions:
            logged = self.reading.events.take(self.partition, position)
            if logged is not None and not catalog.is_forgotten(logged.pseudonym):
                events[position] = logged
        missing = [position for position in positions if position not in events]
        for position, row in self._rows(missing, catalog).items():
            with contextlib.suppress(Forgotten):
                events[position] = self.seals.open(row, position)
        return events

    def forget(self, pseudonym: str) -> None:
        """Drop everything of a user."""
        self.index.forget(pseudonym)
        self.reading.events.forget(self.partition, pseudonym)
        self.commands = [logged for logged in self.commands if logged.pseudonym != pseudonym]

    def let_go(self) -> None:
        """Drop everything that was read: another process has the partition now."""
        self.index.clear_partition(self.partition)
        self.reading.events.forget(self.partition)
        self.next_segment, self.commands, self._snapshot = 0, [], None
        self.memory = EventMemory(self.memory.horizon)
        self._num_read = 0

    # Compaction; the partition's owner alone.

    def is_worth_a_snapshot(self) -> bool:
        """Whether at least as much was read since the last one as has to be copied: a backlog isn't
        copied for ever."""
        return self._num_read >= self.index.num_kept(self.partition)

    def write_snapshot(self, catalog: Catalog) -> Compaction:
        """Save what is still needed of everything read so far. Nothing depends on it until its
        record is there."""
        floor = self.next_segment
        kept = self.index.survivors(self.partition, floor)
        kept += [(logged.ref.position, EventState.COMMAND, 0) for logged in self.commands]
        kept.sort()
        found = self._rows([position for position, _, _ in kept], catalog)
        table = _kept_table([(found[item[0]], *item) for item in kept])
        body = with_digest([table, *self.memory.dump()])
        unique = uuid.uuid4().hex[:8]
        key = paths.snapshot(self.reading.meta.name, self.partition, floor, unique)
        self.reading.store.put(key, body)
        before = catalog.compactions.get(self.partition)
        compaction = Compaction(
            previous=0 if before is None else before.floor,
            floor=floor,
            snapshot=key,
            sha256=hashlib.sha256(body).hexdigest(),
        )
        self._snapshot, self._num_read = Snapshot(compaction, [table]), 0
        return compaction

    def finish_compaction(self, now: Compaction) -> None:
        """Raise the floor that the record names, and delete what lies below it. Repeated by the
        next owner if this one dies in it."""
        self.log.raise_floor(now.previous, now.floor)
        self.log.delete_below(now.floor)
        folder = now.snapshot.rpartition("/")[0]
        for key in list(self.reading.store.list(folder)):
            # Never a newer one: this may be an owner that was fenced meanwhile.
            if key < now.snapshot:
                self.reading.store.delete(key)

    def _rows(self, positions: Sequence[Position], catalog: Catalog) -> dict[Position, Row]:
        """What lies at these places, segment by segment."""
        compaction = catalog.compactions.get(self.partition)
        found: dict[Position, Row] = {}
        by_segment: dict[int, list[int]] = {}
        for segment, row in positions:
            by_segment.setdefault(segment, []).append(row)
        for segment, rows in by_segment.items():
            if compaction is not None and segment < compaction.floor:
                if self._snapshot is None or self._snapshot.compaction != compaction:
                    self._snapshot = self._read_snapshot(compaction)
                found |= {(segment, row): self._snapshot.row((segment, row)) for row in rows}
                continue
            table = decode_rows(self.log.log.key(segment), self._body(segment))
            found |= {(segment, row): row_at(table, row) for row in rows}
        return found

    def _body(self, segment: int) -> bytes:
        """A segment's bytes, from memory or from the store."""
        body = self.reading.segments.get(self.partition, segment)
        if body is None:
            body = self.reading.store.get(self.log.log.key(segment))
            self.reading.segments.put(self.partition, segment, body)
        return body

    def _read_snapshot(self, compaction: Compaction) -> Snapshot:
        body = self.reading.store.get(compaction.snapshot)
        if hashlib.sha256(body).hexdigest() != compaction.sha256:
            raise Damaged(
                f"{compaction.snapshot} is not what its record vouches for; restore it from a copy"
            )
        source = pa.BufferReader(checked(compaction.snapshot, body))
        return Snapshot(compaction, [pa.ipc.open_stream(source).read_all() for _ in range(4)])

    def _start_from(self, snapshot: Snapshot, catalog: Catalog) -> None:
        """Take a snapshot for everything below its floor."""
        self.let_go()
        table = snapshot.tables[0]
        names = table.column("pseudonym").to_pylist()
        unique = list(dict.fromkeys(names))
        consumed = dict(zip(unique, catalog.consumed_of(unique), strict=True)) if unique else {}
        columns = (table.column(name).to_pylist() for name in ("segment", "row", "state", "tokens"))
        rows = zip(names, *columns, strict=True)
        for number, (name, segment, row, state, tokens) in enumerate(rows):
            position = (segment, row)
            if catalog.is_forgotten(name):
                continue
            if state == EventState.COMMAND:
                logged = self._open(row_at(table, number), position)
                if logged is not None and (name, logged.ref.tag) not in catalog.obeyed:
                    self.commands.append(logged)
            elif state == EventState.HELD or position > consumed[name]:
                with contextlib.suppress(Forgotten):  # the key is gone, the tombstone not read yet
                    user = self._user(name, catalog)
                    self.index.add(user, position, EventState(state), tokens, 0.0)
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
            is_consumed = logged.ref.position <= limit
            digest = int(logged.ref.digest[:16], 16) or 1
            first = known[logged.ref.tag] or new.get(logged.ref.tag, 0)
            if not first:
                new[logged.ref.tag] = digest
            state = self._state_of(logged, digest, first, is_consumed, catalog)
            if state is EventState.COMMAND:
                self.commands.append(logged)
            elif state is not None:
                self._add(logged, state, catalog, arrived_at)
                size = len(rows[logged.ref.position[1]]["sealed"])
                self.reading.events.put(self.partition, logged, size)
        if new:
            self.memory.add(list(new), list(new.values()))
        return len(logged_events)

    def _state_of(
        self, logged: LoggedEvent, digest: int, first: int, is_consumed: bool, catalog: Catalog
    ) -> EventState | None:
        """What an event that was just read is to be, None for nothing. `first`: half of the digest
        that its id came with first; 0: it is new."""
        if first:
            is_clash = first != digest and not is_consumed
            return EventState.CLASH if is_clash else None
        if logged.sequence is not None:
            if logged.sequence <= self.memory.highest(logged.pseudonym):
                # Not remembered, though all is: it came late. Else it is a repetition from before
                # the memory.
                is_late = not self.memory.has_forgotten and not is_consumed
                return EventState.OUT_OF_ORDER if is_late else None
            self.memory.raise_highest(logged.pseudonym, logged.sequence)
        if catalog.is_forgotten(logged.pseudonym):
            return None  # the tombstone is there, the key not yet gone
        heldout_share = self.reading.meta.heldout_share
        match logged.event:
            case event if isinstance(event, Command):
                is_obeyed = (logged.pseudonym, logged.ref.tag) in catalog.obeyed
                return None if is_obeyed else EventState.COMMAND
            case Task() if is_held_out(logged.event_id, self._heldout_key, heldout_share):
                return EventState.HELD
        return None if is_consumed else EventState.PENDING

    def _add(
        self, logged: LoggedEvent, state: EventState, catalog: Catalog, arrived_at: float
    ) -> None:
        tokens = 0
        if state is EventState.PENDING:
            tokens = estimate_tokens(logged.event, self.reading.settings.rollout)
        user = self._user(logged.pseudonym, catalog)
        self.index.add(user, logged.ref.position, state, tokens, arrived_at)

    def _user(self, pseudonym: str, catalog: Catalog) -> int:
        """The user's row in the index, made now if there is none."""
        row = self.index.row_of(pseudonym)
        if row is not None:
            return row
        adapter, settings = catalog.get(pseudonym), self.reading.settings
        tenant, rank = 0, settings.adapter.rank if adapter is None else adapter.spec["rank"]
        # A name costs a request: it is only asked for where something depends on it.
        if settings.scheduler.tenants or (adapter is None and settings.user_ranks):
            user = UserId(self.seals.keys.get(pseudonym).user)
            tenant = self.reading.tenant(user)
            rank = settings.user_ranks.get(user, rank) if adapter is None else rank
        return self.index.add_user(pseudonym, self.partition, tenant, rank)

    def _open(self, row: Mapping[str, str | bytes], position: Position) -> LoggedEvent | None:
        try:
            return self.seals.open(row, position)
        except Forgotten:
            return None
        except (Damaged, ObjectNotFound) as error:  # of one user; everybody else goes on
            key = self.log.log.key(position[0])
            logger.error("%s, row %d, is passed over: %s", key, position[1], error)
            return None


def _kept_table(kept: Sequence[tuple[Row, Position, int, int]]) -> pa.Table:
    """(row, position, state, tokens) of every event that a snapshot keeps."""
    columns = {
        name: pa.array([row[name] for row, *_ in kept], kind)
        for name, kind in (
            ("pseudonym", pa.string()),
            ("tag", pa.string()),
            ("sealed", pa.binary()),
        )
    }
    columns |= {
        "segment": pa.array([position[0] for _, position, _, _ in kept], pa.uint32()),
        "row": pa.array([position[1] for _, position, _, _ in kept], pa.uint32()),
        "state": pa.array([int(state) for *_, state, _ in kept], pa.uint8()),
        "tokens": pa.array([tokens for *_, tokens in kept], pa.uint32()),
    }
    return pa.table(columns)
