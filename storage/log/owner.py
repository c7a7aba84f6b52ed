"""The one writer of a partition's revision log: claim, append, commit a wave.

Fencing is the log's own. An owner appends only at the number it expects; finding that number taken
by somebody else means a newer claim, and it stops. No clock decides who may write.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from populace.storage import paths
from populace.storage.errors import AlreadyExists, Fenced, OutcomeUnknown, StoreUnavailable
from populace.storage.keys.keyring import Keyring
from populace.storage.log.manifest import attempt_of, seal
from populace.storage.log.pack import build_pack
from populace.storage.log.reader import RevisionLogReader
from populace.storage.log.records import (
    Claim,
    Record,
    RecordHeader,
    Release,
    RevisionEntry,
    Rotate,
    WaveManifest,
)
from populace.storage.objects.log import Log


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRevision:
    """A revision whose bytes are about to be packed."""

    entry: RevisionEntry
    """Complete but for `blobs`, the places that packing finds out."""
    blobs: Mapping[str, bytes]
    """Part -> bytes as they are to be stored."""


class Owner:
    """Writes one partition from the moment its claim lands until it is fenced or releases it.

    `reader` has read the log to its end; it stays at the end while the owner appends.
    """

    def __init__(self, reader: RevisionLogReader, name: str, keyring: Keyring) -> None:
        self.reader = reader
        self.name = name
        self._appending = threading.RLock()
        """A wave is published while the next one is admitted."""
        self.lost_by: BaseException | None = None
        """Why an append failed: what this owner knows of the log may be wrong, so it writes nothing
        more."""
        self.keyring = keyring
        self._signer = keyring.signer(reader.key)
        self.epoch = reader.next_seq
        self.own_packs: set[str] = set()
        """Packs that this owner's records named."""
        self.append(Claim(owner=name))

    def release(self) -> None:
        self.append(Release(owner=self.name))

    @property
    def is_lost(self) -> bool:
        return self.lost_by is not None

    def append(self, record: Record) -> RecordHeader:
        """Make `record` the log's next one, durably. `Fenced` when another controller took the
        number; `OutcomeUnknown` when the store does not settle it, and then this owner must not go
        on."""
        with self._appending:
            return self._append(record)

    def _append(self, record: Record) -> RecordHeader:
        reader = self.reader
        if self.lost_by is not None:
            kind = Fenced if isinstance(self.lost_by, Fenced) else OutcomeUnknown
            raise kind(
                f"this process no longer owns partition {reader.partition} of "
                f"{reader.population!r}: {self.lost_by}"
            )
        header = RecordHeader(
            population=reader.population,
            partition=reader.partition,
            seq=reader.next_seq,
            epoch=self.epoch,
            attempt_id=uuid.uuid4().hex,
            previous=reader.previous,
            written_at=round(time.time(), 3),
        )
        sealed = seal(header, record, self._signer)
        try:
            _append_until_known(reader.log, header, sealed)
        except BaseException as error:
            self.lost_by = error
            raise
        reader.passed(sealed, header, record)
        if isinstance(record, Rotate):
            self._signer = self.keyring.signer(reader.key)
        return header

    def commit_wave(
        self,
        wave: str,
        revisions: Sequence[NewRevision],
        *,
        parameters: Mapping[str, Any],
        materials: Mapping[str, str],
        numerics: Mapping[str, str],
    ) -> tuple[RecordHeader, WaveManifest]:
        """Write the pack, then the manifest. Nothing has happened until the manifest is there."""
        key = self.new_pack(wave)
        blobs = {
            _name(new.entry, part): blob for new in revisions for part, blob in new.blobs.items()
        }
        body, places = build_pack(key, blobs)
        self.reader.log.store.put(key, body)
        entries = [
            replace(new.entry, blobs={part: places[_name(new.entry, part)] for part in new.blobs})
            for new in revisions
        ]
        manifest = WaveManifest(
            wave=wave,
            pack=key,
            revisions=entries,
            parameters=dict(parameters),
            materials=dict(materials),
            numerics=dict(numerics),
        )
        header = self.append(manifest)
        self.own_packs.add(key)
        return header, manifest

    def new_pack(self, name: str) -> str:
        """A key that no pack has."""
        reader, unique = self.reader, uuid.uuid4().hex[:8]
        return paths.pack(reader.population, reader.partition, self.epoch, name, unique)


def _name(entry: RevisionEntry, part: str) -> str:
    """A blob's name in its pack."""
    return f"{part}/{entry.pseudonym}@{entry.revision}"


def _append_until_known(log: Log, header: RecordHeader, sealed: bytes, tries: int = 8) -> None:
    """A lost answer is resolved by trying to occupy the same number again with the same bytes: then
    the number is certainly taken, by us or by somebody else."""
    for attempt in range(tries):
        try:
            try:
                log.append_at(header.seq, sealed)
                return
            except AlreadyExists:
                there = log.read(header.seq)
        except (OutcomeUnknown, StoreUnavailable):
            there = None
        # Nothing there behind "already exists" is a server's way to say "conflict, try again".
        if there is not None:
            if attempt_of(there) == header.attempt_id:
                return
            raise Fenced(
                f"partition {header.partition} of {header.population!r}: record {header.seq} was "
                "written by "
                "another controller, which owns the partition now; this one stops"
            )
        time.sleep(min(2.0, 0.05 * 2**attempt))
    raise OutcomeUnknown(
        f"the store did not say whether {log.key(header.seq)} was written; start again when it is "
        "reachable"
    )
