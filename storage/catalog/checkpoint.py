"""Checkpoints: one partition's part of the catalog as a Parquet file, so that opening reads the
newest one and the log's tail instead of everything.

A checkpoint lies at the number of the `checkpoint` record that vouches for it with its digest;
without that record it is nobody's. One row per adapter; revisions, their blobs and the notes are
nested lists.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from populace.storage import paths
from populace.storage.canonical import canonical_json
from populace.storage.catalog.attempts import Tries
from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.columns import Names, Rows, ragged
from populace.storage.errors import AlreadyExists, Damaged, ObjectNotFound
from populace.storage.log.manifest import event_from_json
from populace.storage.log.owner import Owner
from populace.storage.log.reader import RevisionLogReader
from populace.storage.log.records import Checkpoint, Compaction

logger = logging.getLogger(__name__)

NUM_KEPT = 2
"""Newest checkpoints that stay; the one before the last is there in case the last gets damaged."""

_ADAPTER = (
    "spec",
    "seed",
    "tip",
    "serving",
    "next_revision",
    "consumed_segment",
    "consumed_row",
    "flags",
    "changed",
)

_REVISION = ("revision", "parent", "seq", "experts", "flags", "num_trained")

_BLOB = ("part", "pack", "offset", "size")

_NOTE = ("seq", "decision", "judged")


def write_checkpoint(owner: Owner, catalog: Catalog) -> int | None:
    """Save the partition's state at the log's end; returns the number. `catalog` has applied all of
    the log. None if a dead controller's file has that number: the next try will have another."""
    reader = owner.reader
    body = dump(catalog, reader.partition)
    seq = reader.next_seq
    try:
        reader.log.store.create(_key(reader, seq), body)
    except AlreadyExists:
        return None  # of a controller whose record never landed; ours comes at a later number
    rotations = [sealed.decode() for sealed in reader.rotations]
    owner.append(
        Checkpoint(
            sha256=hashlib.sha256(body).hexdigest(), size_bytes=len(body), rotations=rotations
        )
    )
    _drop_old(reader, seq)
    return seq


def restore(reader: RevisionLogReader, catalog: Catalog) -> int | None:
    """Load the newest checkpoint that its record vouches for, and move `reader` behind it; None if
    there is none. One that is damaged is named in the log and passed over."""
    store = reader.log.store
    for key in reversed(
        list(store.list(paths.checkpoint_folder(reader.population, reader.partition)))
    ):
        try:
            seq = paths.seq_of_checkpoint(key)
            start = RevisionLogReader(store, reader.population, reader.partition, reader.keys[0])
            record = start.start_at(seq)
            body = store.get(key)
            # Before anything parses them: some flipped bytes crash a Parquet reader instead of
            # failing it.
            if record.sha256 != hashlib.sha256(body).hexdigest():
                raise Damaged("its bytes are not those that its record vouches for")
        except (Damaged, ObjectNotFound, ValueError) as error:
            logger.warning("checkpoint %s is passed over: %s", key, error)
            continue
        load(catalog, reader.partition, body)
        reader.keys, reader.rotations = start.keys, start.rotations
        reader.next_seq, reader.previous = start.next_seq, start.previous
        return seq
    return None


def dump(catalog: Catalog, partition: int) -> bytes:
    """The partition's rows, and everything else of its state as JSON in the file's metadata."""
    rows = np.flatnonzero(catalog.adapters["partition"] == partition)
    columns, named = _columns(catalog, rows)
    state = {**named, **_state(catalog, partition, set(catalog.pseudonyms(rows)))}
    table = pa.table(columns).replace_schema_metadata({"populace": canonical_json(state)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="lz4", use_dictionary=False, write_statistics=False)
    return bytes(sink.getvalue())


def _columns(
    catalog: Catalog, rows: NDArray[np.int64]
) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    """The columns of these adapters, nested as the file has them, and what their codes name."""
    adapters, revisions = catalog.adapters, catalog.revisions
    columns = {name: adapters[name][rows] for name in _ADAPTER}
    specs, columns["spec"] = _renumbered(catalog.specs, columns["spec"])
    columns = {name: pa.array(values) for name, values in columns.items()}
    columns["pseudonym"] = _fixed(_interleave(adapters["high"][rows], adapters["low"][rows]), 16)

    # Revisions of the adapters; their blobs without those that were dropped, which need no place.
    revision_rows, revision_offsets = _children(rows, revisions["adapter"])
    blob_rows, blob_offsets = ragged(
        revisions["first_blob"][revision_rows], revisions["num_blobs"][revision_rows]
    )
    is_there = catalog.blobs["size"][blob_rows] > 0
    blob_offsets = np.concatenate([[0], np.cumsum(is_there)]).astype(np.int32)[blob_offsets]
    blob_rows = blob_rows[is_there]
    use_rows, use_offsets = ragged(
        revisions["first_use"][revision_rows], revisions["num_uses"][revision_rows]
    )
    blobs = {name: catalog.blobs[name][blob_rows] for name in _BLOB}
    packs, blobs["pack"] = _renumbered(catalog.packs, blobs["pack"])
    blobs = {name: pa.array(values) for name, values in blobs.items()}
    blobs["sha256"] = _fixed(catalog.blobs["sha256"][blob_rows], 32)

    # Lists inside lists: adapter -> revisions -> blobs and segments; adapter -> notes.
    of_revision = {name: revisions[name][revision_rows] for name in _REVISION}
    experts, of_revision["experts"] = _renumbered(catalog.experts, of_revision["experts"])
    of_revision = {name: pa.array(values) for name, values in of_revision.items()}
    of_revision["blobs"] = pa.ListArray.from_arrays(blob_offsets, _struct(blobs))
    segments = pa.array(catalog.uses["segment"][use_rows])
    of_revision["segments"] = pa.ListArray.from_arrays(use_offsets, segments)
    columns["revisions"] = pa.ListArray.from_arrays(revision_offsets, _struct(of_revision))
    note_rows, note_offsets = _children(rows, catalog.notes["adapter"])
    notes = {name: pa.array(catalog.notes[name][note_rows]) for name in _NOTE}
    columns["notes"] = pa.ListArray.from_arrays(note_offsets, _struct(notes))
    return columns, {"specs": specs, "packs": packs, "experts": experts}


def _state(catalog: Catalog, partition: int, own: Collection[str]) -> dict[str, Any]:
    """A partition's state that isn't in columns; `own`: the pseudonyms of its adapters."""
    attempts, compaction = catalog.attempts, catalog.compactions.get(partition)
    unfinished = attempts.unfinished.get(partition, {})
    return {
        "owned": catalog.owned.get(partition, False),
        "unfinished": {
            "adapters": {name: [asdict(ref) for ref in refs] for name, refs in unfinished.items()}
        },
        "compaction": None if compaction is None else asdict(compaction),
        "obeyed": sorted(pair for pair in catalog.obeyed if pair[0] in own),
        "tries": {name: asdict(tries) for name, tries in attempts.tries.items() if name in own},
        "failures": {
            name: [asdict(tries.event), tries.count]
            for name, tries in attempts.failures.items()
            if name in own
        },
        "num_settled": catalog.num_settled.get(partition, 0),
    }


def load(catalog: Catalog, partition: int, body: bytes) -> None:
    """Add a partition's rows to a catalog that has none of it."""
    table = pq.read_table(pa.BufferReader(body))
    state = json.loads(table.schema.metadata[b"populace"])
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    halves = _bytes_of(columns["pseudonym"], 16).view(">u8").reshape(-1, 2).astype(np.uint64)
    revisions, notes = columns["revisions"], columns["notes"]
    spec = np.array(catalog.specs.numbers(state["specs"]), np.uint32)
    values = {name: columns[name].to_numpy() for name in _ADAPTER}
    first_adapter = catalog.adapters.append(
        len(halves),
        high=halves[:, 0],
        low=halves[:, 1],
        partition=partition,
        last_revision=_last(revisions, catalog.revisions.size),
        last_note=_last(notes, catalog.notes.size),
        **{**values, "spec": spec[values["spec"]]},
    )
    adapter = np.arange(first_adapter, first_adapter + len(halves))
    catalog.index.add(halves[:, 0], halves[:, 1], adapter)
    _load_revisions(catalog, revisions, adapter, state)
    inner = notes.flatten()
    owner, previous = _links(notes, adapter, catalog.notes.size)
    catalog.notes.append(
        len(inner),
        adapter=owner,
        previous=previous,
        **{name: inner.field(name).to_numpy() for name in _NOTE},
    )
    catalog.obeyed.update((pseudonym, tag) for pseudonym, tag in state["obeyed"])
    catalog.num_settled[partition] = state["num_settled"]
    catalog.owned[partition] = state["owned"]
    for name, tries in state.get("tries", {}).items():
        catalog.attempts.tries[name] = Tries(**{**tries, "event": event_from_json(tries["event"])})
    for name, (ref, count) in state.get("failures", {}).items():
        catalog.attempts.failures[name] = Tries(event=event_from_json(ref), count=count)
    if (tried := state["unfinished"]) is not None and tried["adapters"]:
        catalog.attempts.unfinished[partition] = {
            name: [event_from_json(ref) for ref in refs] for name, refs in tried["adapters"].items()
        }
    if state.get("compaction") is not None:
        catalog.compactions[partition] = Compaction(**state["compaction"])


def _load_revisions(catalog: Catalog, revisions: Any, adapter: Rows, state: dict[str, Any]) -> None:
    inner = revisions.flatten()
    blobs, segments = inner.field("blobs"), inner.field("segments")
    blob, num_blobs, num_uses = blobs.flatten(), _lengths(blobs), _lengths(segments)
    pack = np.array(catalog.packs.numbers(state["packs"]), np.uint32)
    experts = np.array(catalog.experts.numbers([tuple(ids) for ids in state["experts"]]), np.uint32)
    values = {name: blob.field(name).to_numpy() for name in _BLOB}
    values["pack"] = pack[values["pack"]]
    first_blob = catalog.blobs.append(
        len(blob), sha256=_bytes_of(blob.field("sha256"), 32), **values
    )
    used = segments.flatten().to_numpy()
    first_use = catalog.uses.append(len(used), segment=used)
    owner, previous = _links(revisions, adapter, catalog.revisions.size)
    values = {name: inner.field(name).to_numpy() for name in _REVISION}
    values["experts"] = experts[values["experts"]]
    catalog.revisions.append(
        len(inner),
        adapter=owner,
        previous=previous,
        first_blob=first_blob + np.cumsum(num_blobs) - num_blobs,
        num_blobs=num_blobs,
        first_use=first_use + np.cumsum(num_uses) - num_uses,
        num_uses=num_uses,
        **values,
    )


def _drop_old(reader: RevisionLogReader, newest: int) -> None:
    keys = list(reader.log.store.list(paths.checkpoint_folder(reader.population, reader.partition)))
    for key in [key for key in keys if key <= _key(reader, newest)][:-NUM_KEPT]:
        reader.log.store.delete(key)


def _key(reader: RevisionLogReader, seq: int) -> str:
    return paths.checkpoint(reader.population, reader.partition, seq)


def _children(adapters: Rows, owner: NDArray[Any]) -> tuple[Rows, NDArray[np.int32]]:
    """Rows of the children of `adapters`, parent by parent and oldest first, and where each
    parent's begin."""
    mine = np.flatnonzero(np.isin(owner, adapters))
    rows = mine[np.argsort(owner[mine], kind="stable")]
    offsets = np.zeros(len(adapters) + 1, np.int32)
    offsets[1:] = np.searchsorted(owner[rows], adapters, side="right")
    return rows, offsets


def _links(lists: Any, adapter: Rows, first: int) -> tuple[Rows, NDArray[np.int32]]:
    """For the flattened children, appended from row `first` on: their adapter, and the row before
    in its chain."""
    lengths = _lengths(lists)
    owner = np.repeat(adapter, lengths)
    previous = np.arange(first - 1, first - 1 + len(owner), dtype=np.int32)
    starts = np.cumsum(lengths) - lengths
    previous[starts[lengths > 0]] = -1
    return owner, previous


def _last(lists: Any, first: int) -> NDArray[np.int64]:
    """The row of each parent's newest child; -1 without any."""
    lengths = _lengths(lists)
    return np.where(lengths > 0, first + np.cumsum(lengths) - 1, -1)


def _lengths(lists: Any) -> NDArray[np.int64]:
    offsets: NDArray[np.int64] = lists.offsets.to_numpy().astype(np.int64)
    return np.diff(offsets)


def _renumbered(names: Names, numbers: NDArray[Any]) -> tuple[list[Any], NDArray[np.uint32]]:
    """The names that `numbers` use, and the numbers among these."""
    used, renumbered = np.unique(numbers, return_inverse=True)
    return [names.values[number] for number in used], renumbered.astype(np.uint32)


def _struct(fields: dict[str, Any]) -> Any:
    return pa.StructArray.from_arrays(list(fields.values()), names=list(fields))


def _fixed(values: NDArray[np.uint8], width: int) -> Any:
    raw = np.ascontiguousarray(values)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(raw), [None, pa.py_buffer(raw)]
    )


def _interleave(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return np.stack([high, low], axis=1).astype(">u8").view(np.uint8).reshape(-1, 16)


def _bytes_of(array: Any, width: int) -> NDArray[np.uint8]:
    raw = np.frombuffer(array.buffers()[1], np.uint8)
    return raw[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)
