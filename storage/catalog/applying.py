"""How each record of the revision log changes the catalog."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from populace.storage.catalog.columns import halves_of
from populace.storage.catalog.tables import (
    BARE,
    DECISIONS,
    DROPPED,
    FADED,
    FORGOTTEN,
    PARTS,
    PINNED,
    PROMOTED,
    CatalogTables,
)
from populace.storage.log.records import (
    AdapterCreated,
    Attempt,
    Claim,
    Compaction,
    Decision,
    Failed,
    Position,
    Record,
    RecordBatch,
    RecordHeader,
    Release,
    Repack,
    Settled,
    Tombstone,
    Verdict,
    WaveManifest,
)


def apply_record(tables: CatalogTables, header: RecordHeader, record: Record) -> None:
    """Take in one record of the revision log; those of a partition come in the order of their
    numbers."""
    match record:
        case Claim() | Release():
            tables.owned[header.partition] = isinstance(record, Claim)
        case AdapterCreated():
            _create(tables, header, [record])
        case Attempt():
            tables.attempts.begin(header.partition, record)
        case Failed():
            tables.attempts.fail(header.partition, record)
        case Compaction():
            tables.compactions[header.partition] = record
        case WaveManifest():
            _add_revisions(tables, header, record)
        case Settled():
            row = tables.row_of(record.pseudonym)
            tables.num_settled[header.partition] += len(record.events)
            _consume(tables, row, record.consumed)
            _note(tables, row, header.seq, "settled", 0)
            tables.attempts.end(header.partition, {record.pseudonym})
        case Verdict():
            _judge(tables, header, record)
        case Tombstone():
            _bury(tables, header, record)
        case Repack():
            _repack(tables, record)
        case RecordBatch():
            _create(
                tables,
                header,
                [part for part in record.records if isinstance(part, AdapterCreated)],
            )
            for part in record.records:
                if not isinstance(part, AdapterCreated):
                    apply_record(tables, header, part)


def _create(
    tables: CatalogTables, header: RecordHeader, created: Sequence[AdapterCreated], flags: int = 0
) -> None:
    if not created:
        return
    high, low = halves_of([record.pseudonym for record in created])
    first = tables.adapters.append(
        len(created),
        high=high,
        low=low,
        partition=header.partition,
        seed=[record.seed for record in created],
        tip=0,
        serving=0,
        next_revision=1,
        consumed_segment=-1,
        consumed_row=-1,
        flags=flags,
        last_revision=-1,
        spec=tables.specs.numbers(
            [_spec_json(tuple(sorted(record.spec.items()))) for record in created]
        ),
        last_note=-1,
        changed=header.seq,
    )
    tables.index.add(high, low, np.arange(first, first + len(created)))


def _add_revisions(tables: CatalogTables, header: RecordHeader, wave: WaveManifest) -> None:
    """All of a wave at once, column by column."""
    entries = wave.revisions
    rows = tables.rows_of([entry.pseudonym for entry in entries])
    assert (rows >= 0).all(), "the log has a revision before its adapter"
    blobs = [(PARTS.index(part), place) for entry in entries for part, place in entry.blobs.items()]
    uses = [sorted({event.position[0] for event in entry.trained}) for entry in entries]
    num_blobs = np.array([len(entry.blobs) for entry in entries])
    num_uses = np.array([len(used) for used in uses])
    first_blob = tables.blobs.append(
        len(blobs),
        part=[part for part, _ in blobs],
        pack=tables.packs.numbers([place.pack for _, place in blobs]),
        offset=[place.offset for _, place in blobs],
        size=[place.size_bytes for _, place in blobs],
        sha256=_digests([place.sha256 for _, place in blobs]),
    )
    first_use = tables.uses.append(
        int(num_uses.sum()), segment=[segment for used in uses for segment in used]
    )
    revision = np.array([entry.revision for entry in entries])
    first = tables.revisions.append(
        len(entries),
        adapter=rows,
        revision=revision,
        parent=[entry.parent for entry in entries],
        seq=header.seq,
        previous=tables.adapters["last_revision"][rows],
        experts=tables.experts.numbers([tuple(entry.experts) for entry in entries]),
        flags=0,
        num_trained=np.minimum([len(entry.trained) for entry in entries], 65535),
        first_blob=first_blob + np.cumsum(num_blobs) - num_blobs,
        num_blobs=num_blobs,
        first_use=first_use + np.cumsum(num_uses) - num_uses,
        num_uses=num_uses,
    )
    for row, tip in zip(rows.tolist(), tables.adapters["tip"][rows].tolist(), strict=True):
        if tip:
            _fade(tables, tables.revision_row(row, tip))
    tables.adapters["last_revision"][rows] = np.arange(first, first + len(entries))
    tables.adapters["tip"][rows] = revision
    tables.adapters["next_revision"][rows] = revision + 1
    tables.adapters["changed"][rows] = header.seq
    for row, entry in zip(rows.tolist(), entries, strict=True):
        _consume(tables, row, entry.consumed)
    tables.num_settled[header.partition] += sum(len(entry.settled) for entry in entries)
    tables.attempts.end(header.partition, {entry.pseudonym for entry in entries})


def _judge(tables: CatalogTables, header: RecordHeader, record: Verdict) -> None:
    row = tables.row_of(record.pseudonym)
    if record.tip != tables.adapters["tip"][row] != 0:
        _fade(tables, tables.revision_row(row, int(tables.adapters["tip"][row])))
    tables.adapters["tip"][row], tables.adapters["serving"][row] = record.tip, record.serving
    if record.judged and record.decision in (Decision.PROMOTE, Decision.PIN, Decision.UNPIN):
        flags = tables.revisions["flags"]
        at = tables.revision_row(row, record.judged)
        match record.decision:
            case Decision.PROMOTE:
                flags[at] |= PROMOTED
            case Decision.PIN:
                flags[at] |= PINNED
            case Decision.UNPIN:
                flags[at] &= ~PINNED & 0xFF
                if record.judged != record.tip:
                    _fade(tables, at)
    _note(tables, row, header.seq, record.decision, record.judged)
    if record.command is not None:
        tables.obeyed.add((record.pseudonym, record.command))


def _fade(tables: CatalogTables, revision_row: int) -> None:
    if not tables.revisions["flags"][revision_row] & PINNED:
        tables.revisions["flags"][revision_row] |= FADED


def _bury(tables: CatalogTables, header: RecordHeader, record: Tombstone) -> None:
    if tables.rows_of([record.pseudonym])[0] < 0:
        _create(tables, header, [AdapterCreated(pseudonym=record.pseudonym, spec={}, seed=0)], BARE)
    row = tables.row_of(record.pseudonym)
    tables.adapters["flags"][row] |= FORGOTTEN
    tables.adapters["changed"][row] = header.seq
    tables.obeyed.add((record.pseudonym, record.command))
    tables.attempts.end(header.partition, {record.pseudonym})


def _repack(tables: CatalogTables, record: Repack) -> None:
    pack = tables.packs.number(record.pack)
    for moved in record.moved:
        blob = _blob(tables, moved.pseudonym, moved.revision, moved.part)
        tables.blobs["pack"][blob], tables.blobs["offset"][blob] = pack, moved.offset
    for pseudonym, revision, part in record.dropped:
        tables.blobs["size"][_blob(tables, pseudonym, revision, part)] = 0
        if part == "weights":
            tables.revisions["flags"][tables.revision_row(tables.row_of(pseudonym), revision)] |= (
                DROPPED
            )


def _blob(tables: CatalogTables, pseudonym: str, revision: int, part: str) -> int:
    row = tables.revision_row(tables.row_of(pseudonym), revision)
    first = int(tables.revisions["first_blob"][row])
    parts = tables.blobs["part"][first : first + int(tables.revisions["num_blobs"][row])]
    return first + int(np.flatnonzero(parts == PARTS.index(part))[0])


def _consume(tables: CatalogTables, row: int, consumed: Position) -> None:
    table = tables.adapters
    if consumed > (int(table["consumed_segment"][row]), int(table["consumed_row"][row])):
        table["consumed_segment"][row], table["consumed_row"][row] = consumed


def _note(tables: CatalogTables, row: int, seq: int, decision: str, judged: int) -> None:
    tables.adapters["changed"][row] = seq
    tables.adapters["last_note"][row] = tables.notes.append(
        1, adapter=row, seq=seq, previous=tables.adapters["last_note"][row],
        decision=DECISIONS.index(decision), judged=judged,
    )  # fmt: skip


@functools.cache
def _spec_json(items: tuple[tuple[str, Any], ...]) -> str:
    return json.dumps(dict(items))


def _digests(texts: Sequence[str]) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(-1, 32)
