"""The catalog: for every adapter its revisions, tip, serving and consumed position. Derived from the revision
logs alone; losing it costs a replay, a checkpoint makes that short.

    adapters   one row per adapter           revisions  one row per revision, chained newest to oldest
    blobs      one row per part of a revision           uses  segments of experience that a revision learned from
    notes      verdicts and settled records, chained newest to oldest

About 200 bytes for an adapter with one revision of one part; no Python object per user.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from populace.storage.catalog.applying import _digests, _spec_json
from populace.storage.catalog.columns import Index, Names, Rows, Table, halves_of
from populace.storage.catalog.states import AdapterState, Note, RevisionState
from populace.storage.errors import InvalidInput
from populace.storage.log.pack import BlobPlace
from populace.storage.log.records import (
    BEFORE_ALL,
    AdapterCreated,
    Attempt,
    Batch,
    Claim,
    Compaction,
    EventRef,
    Failed,
    Position,
    Record,
    RecordHeader,
    Release,
    Repack,
    Settled,
    Tombstone,
    Tries,
    Verdict,
    WaveManifest,
)

PARTS = ("weights", "moments", "evidence")

DECISIONS = ("settled", "promote", "keep", "reject", "rollback", "refused", "pin", "unpin")
"""What a note is; `settled` is no decision."""

FORGOTTEN, BARE = 1, 2
"""Flags of an adapter: its user is forgotten; only a tombstone, there never was an adapter."""

PROMOTED, PINNED, DROPPED, FADED = 1, 2, 4, 8
"""Flags of a revision. FADED: it stopped being the tip while it wasn't pinned, so its moments are gone for good, also
while their bytes are still in a pack: what an update starts from must depend on the log alone."""


class Catalog:
    """All adapters of a population. `apply` is the only way it changes; `checkpoint.py` saves and restores it."""

    def __init__(self, unmask_seed: Callable[[str, int], int] = lambda pseudonym, seed: seed) -> None:
        self._unmask_seed = unmask_seed
        self.adapters = Table(
            high="u8", low="u8", partition="u2", spec="u4", seed="u8", tip="u4", serving="u4", next_revision="u4",
            consumed_segment="i4", consumed_row="i4", flags="u1", last_revision="i4", last_note="i4", changed="u4",
        )  # fmt: skip
        self.revisions = Table(
            adapter="u4", revision="u4", parent="u4", seq="u4", previous="i4", experts="u4", flags="u1",
            num_trained="u2", first_blob="u4", num_blobs="u1", first_use="u4", num_uses="u2",
        )  # fmt: skip
        self.blobs = Table(part="u1", pack="u4", offset="u8", size="u4", sha256=("u1", (32,)))
        self.uses = Table(segment="u4")
        self.notes = Table(adapter="u4", seq="u4", previous="i4", decision="u1", judged="u4")
        self.index = Index()
        self.specs, self.packs, self.experts = Names(), Names(), Names()
        self.num_settled: Counter[int] = Counter()
        """Per partition: events that ended without being trained on."""
        self.obeyed: set[tuple[str, str]] = set()
        """(pseudonym, tag) of commands that have their verdict."""
        self.tries: dict[str, Tries] = {}
        """Pseudonym -> attempts without an outcome."""
        self.failures: dict[str, tuple[EventRef, int]] = {}
        """Pseudonym -> the event whose tries failed last, and how often."""
        self.unfinished: dict[int, dict[str, list[EventRef]]] = {}
        """Per partition: pseudonym -> the events whose attempt no outcome has followed."""
        self.compactions: dict[int, Compaction] = {}
        """Per partition: the last one."""
        self.owned: dict[int, bool] = {}
        """Per partition: whether the last claim is still unreleased."""

    def apply(self, header: RecordHeader, record: Record) -> None:
        match record:
            case Claim() | Release():
                self.owned[header.partition] = isinstance(record, Claim)
            case AdapterCreated():
                self._create(header, [record])
            case Attempt():
                tried = self.unfinished.setdefault(header.partition, {})
                tried.update({pseudonym: refs for pseudonym, refs in record.adapters.items() if refs})
                self._forget_unfinished(header.partition, [name for name, refs in record.adapters.items() if not refs])
                self._count_tries(record)
            case Failed():
                ref, count = self.failures.get(record.pseudonym, (record.event, 0))
                self.failures[record.pseudonym] = (record.event, count + 1 if ref == record.event else 1)
                self._finish(header.partition, {record.pseudonym})
            case Compaction():
                self.compactions[header.partition] = record
            case WaveManifest():
                self._add_revisions(header, record)
            case Settled():
                row = self._row(record.pseudonym)
                self.num_settled[header.partition] += len(record.events)
                self._consume(row, record.consumed)
                self._note(row, header.seq, "settled", 0)
                self.failures.pop(record.pseudonym, None)
                self._finish(header.partition, {record.pseudonym})
            case Verdict():
                self._judge(header, record)
            case Tombstone():
                self._bury(header, record)
            case Repack():
                self._repack(record)
            case Batch():
                self._create(header, [part for part in record.records if isinstance(part, AdapterCreated)])
                for part in record.records:
                    if not isinstance(part, AdapterCreated):
                        self.apply(header, part)

    # Looking things up.

    def __len__(self) -> int:
        return int(np.count_nonzero(self.adapters["flags"] & BARE == 0))

    def __iter__(self) -> Iterator[AdapterState]:
        """Every living adapter; for few of them, or for reports."""
        for row in np.flatnonzero(self.adapters["flags"] == 0):
            yield self.state(int(row))

    def __contains__(self, pseudonym: str) -> bool:
        """Whether there is an adapter, of a forgotten user too."""
        return bool(self.rows_of([pseudonym])[0] >= 0)

    def rows_of(self, pseudonyms: Sequence[str]) -> Rows:
        """The adapters' rows; -1 for those that aren't there."""
        return self.index.find(*halves_of(pseudonyms))

    def get(self, pseudonym: str) -> AdapterState | None:
        """None when there is no adapter, or its user is forgotten."""
        row = int(self.rows_of([pseudonym])[0])
        return None if row < 0 or self.adapters["flags"][row] else self.state(row)

    def require(self, pseudonym: str) -> AdapterState:
        found = self.get(pseudonym)
        if found is None:
            raise InvalidInput(f"no adapter {pseudonym!r}")
        return found

    def is_forgotten(self, pseudonym: str) -> bool:
        row = int(self.rows_of([pseudonym])[0])
        return row >= 0 and bool(self.adapters["flags"][row] & FORGOTTEN)

    def forgotten(self, partitions: Collection[int] | None = None) -> list[str]:
        """Everyone with a tombstone, in these partitions or in all."""
        has_tombstone = (self.adapters["flags"] & FORGOTTEN) > 0
        if partitions is not None:
            has_tombstone &= np.isin(self.adapters["partition"], list(partitions))
        return self.pseudonyms(np.flatnonzero(has_tombstone))

    def consumed_of(self, pseudonyms: Sequence[str]) -> list[Position]:
        """Consumed positions; `BEFORE_ALL` for those without an adapter."""
        rows, table = self.rows_of(pseudonyms), self.adapters
        segments, places = table["consumed_segment"], table["consumed_row"]
        return [BEFORE_ALL if row < 0 else (int(segments[row]), int(places[row])) for row in rows.tolist()]

    def state(self, row: int) -> AdapterState:
        table = self.adapters
        pseudonym = f"{int(table['high'][row]):016x}{int(table['low'][row]):016x}"
        return AdapterState(
            catalog=self,
            row=row,
            pseudonym=pseudonym,
            partition=int(table["partition"][row]),
            spec=json.loads(self.specs.values[table["spec"][row]]),
            seed=self._unmask_seed(pseudonym, int(table["seed"][row])),
            tip=int(table["tip"][row]),
            serving=int(table["serving"][row]),
            next_revision=int(table["next_revision"][row]),
            consumed=(int(table["consumed_segment"][row]), int(table["consumed_row"][row])),
        )

    def unjudged(self) -> list[AdapterState]:
        """Adapters whose tip is not what serves."""
        table = self.adapters
        rows = np.flatnonzero((table["tip"] != table["serving"]) & (table["flags"] == 0))
        return [self.state(int(row)) for row in rows]

    def num_updated(self) -> int:
        """Adapters beyond revision 0."""
        return int(np.count_nonzero(self.adapters["next_revision"] > 1))

    def in_partition(self, partition: int) -> Rows:
        """Rows of a partition's living adapters."""
        return np.flatnonzero((self.adapters["partition"] == partition) & (self.adapters["flags"] == 0))

    def changed_since(self, partition: int, seq: int) -> list[str]:
        """Adapters of a partition that a record after number `seq` changed."""
        table = self.adapters
        rows = np.flatnonzero((table["partition"] == partition) & (table["changed"] > seq))
        return self.pseudonyms(rows)

    def revisions_using(self, partition: int, segment: int) -> list[tuple[str, int]]:
        """(pseudonym, revision) of every revision that learned from a segment of the partition's experience."""
        use = np.flatnonzero(self.uses["segment"] == segment)
        # Revisions and their uses are appended together, so the first use of a revision never falls.
        revision = np.searchsorted(self.revisions["first_use"], use, side="right") - 1
        adapter = self.revisions["adapter"][revision]
        mine = self.adapters["partition"][adapter] == partition
        names = self.pseudonyms(adapter[mine])
        return list(zip(names, self.revisions["revision"][revision[mine]].tolist(), strict=True))

    def pseudonyms(self, rows: NDArray[Any]) -> list[str]:
        high, low = self.adapters["high"][rows], self.adapters["low"][rows]
        return [f"{a:016x}{b:016x}" for a, b in zip(high.tolist(), low.tolist(), strict=True)]

    def referenced_packs(self, partition: int) -> set[str]:
        """Packs that hold a blob of the partition's revisions."""
        revision = np.flatnonzero(self.adapters["partition"][self.revisions["adapter"]] == partition)
        owner = np.repeat(np.arange(self.revisions.size), self.revisions["num_blobs"])
        here = np.isin(owner, revision) & (self.blobs["size"] > 0)
        return {self.packs.values[number] for number in np.unique(self.blobs["pack"][here])}

    def count_decisions(self) -> Counter[str]:
        counts = np.bincount(self.notes["decision"], minlength=len(DECISIONS))
        return Counter({name: int(count) for name, count in zip(DECISIONS, counts, strict=True)})

    @property
    def size_bytes(self) -> int:
        """Memory of all columns and the index."""
        tables = (self.adapters, self.revisions, self.blobs, self.uses, self.notes)
        return sum(table.size_bytes for table in tables) + self.index.size_bytes

    # One adapter's chains.

    def revision_rows(self, adapter: int) -> list[int]:
        """Newest first."""
        rows, row = [], int(self.adapters["last_revision"][adapter])
        while row >= 0:
            rows.append(row)
            row = int(self.revisions["previous"][row])
        return rows

    def revision_row(self, adapter: int, revision: int) -> int:
        row = int(self.adapters["last_revision"][adapter])
        while row >= 0 and self.revisions["revision"][row] != revision:
            row = int(self.revisions["previous"][row])
        assert row >= 0, f"revision {revision} was never committed"
        return row

    def revision_state(self, adapter: int, revision: int) -> RevisionState:
        return self.revision_at(self.revision_row(adapter, revision))

    def revision_at(self, row: int) -> RevisionState:
        table, blobs = self.revisions, {}
        first = int(table["first_blob"][row])
        for blob in range(first, first + int(table["num_blobs"][row])):
            has_faded = self.blobs["part"][blob] == PARTS.index("moments") and table["flags"][row] & FADED
            if self.blobs["size"][blob] and not has_faded:
                blobs[PARTS[self.blobs["part"][blob]]] = self.place_of(blob)
        flags = int(table["flags"][row])
        return RevisionState(
            revision=int(table["revision"][row]),
            parent=int(table["parent"][row]),
            seq=int(table["seq"][row]),
            blobs=blobs,
            experts=self.experts.values[table["experts"][row]],
            num_trained=int(table["num_trained"][row]),
            is_promoted=bool(flags & PROMOTED),
            is_pinned=bool(flags & PINNED),
        )

    def place_of(self, blob: int) -> BlobPlace:
        return BlobPlace(
            pack=self.packs.values[self.blobs["pack"][blob]],
            offset=int(self.blobs["offset"][blob]),
            size_bytes=int(self.blobs["size"][blob]),
            sha256=self.blobs["sha256"][blob].tobytes().hex(),
        )

    def parents_of(self, adapter: int) -> dict[int, int]:
        rows = self.revision_rows(adapter)
        return dict(
            zip(self.revisions["revision"][rows].tolist(), self.revisions["parent"][rows].tolist(), strict=True)
        )

    def notes_of(self, adapter: int) -> list[Note]:
        found, row = [], int(self.adapters["last_note"][adapter])
        while row >= 0:
            decision = DECISIONS[self.notes["decision"][row]]
            found.append(
                Note(seq=int(self.notes["seq"][row]), decision=decision, judged=int(self.notes["judged"][row]))
            )
            row = int(self.notes["previous"][row])
        return found[::-1]

    # How records change it.

    def _row(self, pseudonym: str) -> int:
        row = int(self.rows_of([pseudonym])[0])
        assert row >= 0, f"the log speaks of adapter {pseudonym!r} before creating it"
        return row

    def _create(self, header: RecordHeader, created: Sequence[AdapterCreated], flags: int = 0) -> None:
        if not created:
            return
        high, low = halves_of([record.pseudonym for record in created])
        first = self.adapters.append(
            len(created), high=high, low=low, partition=header.partition, seed=[record.seed for record in created],
            tip=0, serving=0, next_revision=1, consumed_segment=-1, consumed_row=-1, flags=flags, last_revision=-1,
            spec=self.specs.numbers([_spec_json(tuple(sorted(record.spec.items()))) for record in created]),
            last_note=-1, changed=header.seq,
        )  # fmt: skip
        self.index.add(high, low, np.arange(first, first + len(created)))

    def _add_revisions(self, header: RecordHeader, wave: WaveManifest) -> None:
        """All of a wave at once, column by column."""
        entries = wave.revisions
        rows = self.rows_of([entry.pseudonym for entry in entries])
        assert (rows >= 0).all(), "the log has a revision before its adapter"
        blobs = [(PARTS.index(part), place) for entry in entries for part, place in entry.blobs.items()]
        uses = [sorted({event.position[0] for event in entry.trained}) for entry in entries]
        num_blobs = np.array([len(entry.blobs) for entry in entries])
        num_uses = np.array([len(used) for used in uses])
        first_blob = self.blobs.append(
            len(blobs),
            part=[part for part, _ in blobs],
            pack=self.packs.numbers([place.pack for _, place in blobs]),
            offset=[place.offset for _, place in blobs],
            size=[place.size_bytes for _, place in blobs],
            sha256=_digests([place.sha256 for _, place in blobs]),
        )
        first_use = self.uses.append(int(num_uses.sum()), segment=[segment for used in uses for segment in used])
        revision = np.array([entry.revision for entry in entries])
        first = self.revisions.append(
            len(entries),
            adapter=rows,
            revision=revision,
            parent=[entry.parent for entry in entries],
            seq=header.seq,
            previous=self.adapters["last_revision"][rows],
            experts=self.experts.numbers([tuple(entry.experts) for entry in entries]),
            flags=0,
            num_trained=np.minimum([len(entry.trained) for entry in entries], 65535),
            first_blob=first_blob + np.cumsum(num_blobs) - num_blobs,
            num_blobs=num_blobs,
            first_use=first_use + np.cumsum(num_uses) - num_uses,
            num_uses=num_uses,
        )
        for row, tip in zip(rows.tolist(), self.adapters["tip"][rows].tolist(), strict=True):
            if tip:
                self._fade(self.revision_row(row, tip))
        self.adapters["last_revision"][rows] = np.arange(first, first + len(entries))
        self.adapters["tip"][rows] = revision
        self.adapters["next_revision"][rows] = revision + 1
        self.adapters["changed"][rows] = header.seq
        for row, entry in zip(rows.tolist(), entries, strict=True):
            self._consume(row, entry.consumed)
        self.num_settled[header.partition] += sum(len(entry.settled) for entry in entries)
        for entry in entries:
            self.failures.pop(entry.pseudonym, None)
        self._finish(header.partition, {entry.pseudonym for entry in entries})

    def _judge(self, header: RecordHeader, record: Verdict) -> None:
        row = self._row(record.pseudonym)
        if record.tip != self.adapters["tip"][row] != 0:
            self._fade(self.revision_row(row, int(self.adapters["tip"][row])))
        self.adapters["tip"][row], self.adapters["serving"][row] = record.tip, record.serving
        if record.judged and record.decision in ("promote", "pin", "unpin"):
            flags = self.revisions["flags"]
            at = self.revision_row(row, record.judged)
            match record.decision:
                case "promote":
                    flags[at] |= PROMOTED
                case "pin":
                    flags[at] |= PINNED
                case "unpin":
                    flags[at] &= ~PINNED & 0xFF
                    if record.judged != record.tip:
                        self._fade(at)
        self._note(row, header.seq, record.decision, record.judged)
        if record.command is not None:
            self.obeyed.add((record.pseudonym, record.command))

    def _fade(self, revision_row: int) -> None:
        if not self.revisions["flags"][revision_row] & PINNED:
            self.revisions["flags"][revision_row] |= FADED

    def _bury(self, header: RecordHeader, record: Tombstone) -> None:
        if record.pseudonym not in self:
            self._create(header, [AdapterCreated(pseudonym=record.pseudonym, spec={}, seed=0)], BARE)
        row = self._row(record.pseudonym)
        self.adapters["flags"][row] |= FORGOTTEN
        self.adapters["changed"][row] = header.seq
        self.obeyed.add((record.pseudonym, record.command))
        self.failures.pop(record.pseudonym, None)
        self._finish(header.partition, {record.pseudonym})

    def _repack(self, record: Repack) -> None:
        pack = self.packs.number(record.pack)
        for moved in record.moved:
            blob = self._blob(moved.pseudonym, moved.revision, moved.part)
            self.blobs["pack"][blob], self.blobs["offset"][blob] = pack, moved.offset
        for pseudonym, revision, part in record.dropped:
            self.blobs["size"][self._blob(pseudonym, revision, part)] = 0
            if part == "weights":
                self.revisions["flags"][self.revision_row(self._row(pseudonym), revision)] |= DROPPED

    def _blob(self, pseudonym: str, revision: int, part: str) -> int:
        row = self.revision_row(self._row(pseudonym), revision)
        first = int(self.revisions["first_blob"][row])
        parts = self.blobs["part"][first : first + int(self.revisions["num_blobs"][row])]
        return first + int(np.flatnonzero(parts == PARTS.index(part))[0])

    def _consume(self, row: int, consumed: Position) -> None:
        table = self.adapters
        if consumed > (int(table["consumed_segment"][row]), int(table["consumed_row"][row])):
            table["consumed_segment"][row], table["consumed_row"][row] = consumed

    def _note(self, row: int, seq: int, decision: str, judged: int) -> None:
        self.adapters["changed"][row] = seq
        self.adapters["last_note"][row] = self.notes.append(
            1, adapter=row, seq=seq, previous=self.adapters["last_note"][row],
            decision=DECISIONS.index(decision), judged=judged,
        )  # fmt: skip

    def _count_tries(self, attempt: Attempt) -> None:
        for pseudonym, refs in attempt.adapters.items():
            before = self.tries.get(pseudonym)
            if refs:
                count = before.count + 1 if before is not None and before.event == refs[0] else 1
                is_alone = attempt.num_adapters == 1 and len(refs) == 1
                self.tries[pseudonym] = Tries(event=refs[0], count=count, is_alone=is_alone)
            elif before is not None and before.count > 1:
                self.tries[pseudonym] = Tries(event=before.event, count=before.count - 1, is_alone=False)
            else:
                self.tries.pop(pseudonym, None)

    def _finish(self, partition: int, pseudonyms: set[str]) -> None:
        """An attempt ends user by user; what is left when a new owner looks died with the old one."""
        for pseudonym in pseudonyms:
            self.tries.pop(pseudonym, None)
        self._forget_unfinished(partition, pseudonyms)

    def _forget_unfinished(self, partition: int, pseudonyms: Iterable[str]) -> None:
        tried = self.unfinished.get(partition, {})
        for pseudonym in pseudonyms:
            tried.pop(pseudonym, None)
        if not tried:
            self.unfinished.pop(partition, None)
