"""The one writer of a partition's revision log: claim, append, commit a wave.

Fencing is the log's own. An owner appends only at the number it expects; finding that number taken by somebody
else means a newer claim, and it stops. No clock decides who may write.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from populace.storage.errors import AlreadyExists, Damaged, Fenced, OutcomeUnknown
from populace.storage.log import Log
from populace.storage.manifest import (
    NO_PREDECESSOR,
    Claim,
    EventRef,
    Position,
    Record,
    RecordHeader,
    Release,
    RevisionEntry,
    SettledEvent,
    WaveManifest,
    digest_of,
    open_record,
    seal,
)
from populace.storage.objects import ObjectStore
from populace.storage.pack import build_pack


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionDraft:
    """A new revision whose bytes are not yet in a pack."""

    pseudonym: str
    revision: int
    parent: int
    blobs: dict[str, bytes]
    experts: list[int]
    trained: list[EventRef]
    settled: list[SettledEvent]
    consumed: Position
    metrics: dict[str, float]


class RevisionLogReader:
    """Follows a revision log, checking that every record continues the one before."""

    def __init__(self, store: ObjectStore, population: str, partition: int) -> None:
        self.log = Log(store, f"{population}/revisions/{partition}", ".json")
        self.population = population
        self.partition = partition
        self.next_seq = 0
        self.previous = NO_PREDECESSOR

    def read_new(self) -> Iterator[tuple[RecordHeader, Record]]:
        """Records since the last call; raises `Damaged` at the first that does not fit."""
        for seq, sealed in self.log.read_from(self.next_seq):
            header, record = open_record(sealed)
            if (header.population, header.partition, header.seq) != (self.population, self.partition, seq):
                raise Damaged(f"{self.log.key(seq)} belongs to another place: {header}")
            if header.previous != self.previous:
                raise Damaged(f"{self.log.key(seq)} does not continue the record before it")
            self.next_seq, self.previous = seq + 1, digest_of(sealed)
            yield header, record


class Owner:
    """Writes one partition from the moment its claim lands until it is fenced or releases it.

    `reader` has read the log to its end; it stays at the end while the owner appends.
    """

    def __init__(self, reader: RevisionLogReader, name: str) -> None:
        self.reader = reader
        self.name = name
        self.is_lost = False
        """True once an append failed: what this owner knows of the log may be wrong, so it writes nothing more."""
        self.epoch = reader.next_seq
        self.append(Claim(owner=name))

    def release(self) -> None:
        self.append(Release(owner=self.name))

    def append(self, record: Record) -> RecordHeader:
        """Make `record` the log's next one, durably. `Fenced` when another controller took the number;
        `OutcomeUnknown` when the store does not settle it, and then this owner must not go on."""
        reader = self.reader
        if self.is_lost:
            raise Fenced(f"this process no longer owns partition {reader.partition} of {reader.population!r}")
        header = RecordHeader(
            population=reader.population,
            partition=reader.partition,
            seq=reader.next_seq,
            epoch=self.epoch,
            attempt_id=uuid.uuid4().hex,
            previous=reader.previous,
        )
        sealed = seal(header, record)
        try:
            _append_until_known(reader.log, header, sealed)
        except BaseException:
            self.is_lost = True
            raise
        reader.next_seq, reader.previous = header.seq + 1, digest_of(sealed)
        return header

    def commit_wave(
        self,
        wave: str,
        drafts: Sequence[RevisionDraft],
        *,
        parameters: Mapping[str, Any],
        materials: Mapping[str, str],
        numerics: Mapping[str, str],
    ) -> tuple[RecordHeader, WaveManifest]:
        """Write the pack, then the manifest. Nothing has happened until the manifest is there."""
        # The random part: a second try of a wave must never write over a pack that a manifest may name.
        name = f"{self.epoch:020d}-{wave}-{uuid.uuid4().hex[:8]}.safetensors"
        key = f"{self.reader.population}/packs/{self.reader.partition}/{name}"
        blobs = {
            f"{part}/{draft.pseudonym}@{draft.revision}": blob for draft in drafts for part, blob in draft.blobs.items()
        }
        body, places = build_pack(key, blobs)
        self.reader.log.store.put(key, body)
        entries = [
            RevisionEntry(
                pseudonym=draft.pseudonym,
                revision=draft.revision,
                parent=draft.parent,
                blobs={part: places[f"{part}/{draft.pseudonym}@{draft.revision}"] for part in draft.blobs},
                experts=draft.experts,
                trained=draft.trained,
                settled=draft.settled,
                consumed=draft.consumed,
                metrics=draft.metrics,
            )
            for draft in drafts
        ]
        manifest = WaveManifest(
            wave=wave,
            revisions=entries,
            parameters=dict(parameters),
            materials=dict(materials),
            numerics=dict(numerics),
        )
        return self.append(manifest), manifest


def _append_until_known(log: Log, header: RecordHeader, sealed: bytes, tries: int = 8) -> None:
    """A lost answer is resolved by trying to occupy the same number again with the same bytes: then the number
    is certainly taken, by us or by somebody else."""
    for attempt in range(tries):
        try:
            log.append_at(header.seq, sealed)
            return
        except AlreadyExists:
            there = log.read(header.seq)
            if there is not None and open_record(there)[0].attempt_id == header.attempt_id:
                return
            raise Fenced(
                f"partition {header.partition} of {header.population!r}: record {header.seq} was written by "
                "another controller, which owns the partition now; this one stops"
            ) from None
        except OutcomeUnknown:
            time.sleep(min(2.0, 0.05 * 2**attempt))
    raise OutcomeUnknown(
        f"the store did not say whether {log.key(header.seq)} was written; start again when it is reachable"
    )
