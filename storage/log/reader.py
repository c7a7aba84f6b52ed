"""Following a revision log: every record is signed and continues the one before."""

from __future__ import annotations

from collections.abc import Iterator

from populace.storage import paths
from populace.storage.errors import Damaged
from populace.storage.keys.keyring import PublicKey
from populace.storage.log.manifest import digest_of, open_record, rotations_of, signer_of
from populace.storage.log.records import NO_PREDECESSOR, Checkpoint, Record, RecordHeader, Rotate
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.log import Log


class RevisionLogReader:
    """Follows a revision log, checking that every record is signed and continues the one before."""

    def __init__(
        self, store: ObjectStore, population: str, partition: int, root_key: PublicKey
    ) -> None:
        self.log = Log(store, paths.revision_folder(population, partition), ".json")
        self.population = population
        self.partition = partition
        self.next_seq = 0
        self.previous = NO_PREDECESSOR
        self.keys = [root_key]
        """Root first; each signed the record that hands over to the next. The last signs new
        records."""
        self.rotations: list[bytes] = []
        """Those records, as stored."""

    @property
    def key(self) -> PublicKey:
        return self.keys[-1]

    def read_new(self) -> Iterator[tuple[RecordHeader, Record]]:
        """Records since the last call; raises `Damaged` at the first that does not fit."""
        for seq, sealed in self.log.read_from(self.next_seq):
            header, record = self._check(seq, sealed, self.key)
            if header.previous != self.previous:
                raise Damaged(f"{self.log.key(seq)} does not continue the record before it")
            self.passed(sealed, header, record)
            yield header, record

    def read_at(self, seq: int) -> tuple[RecordHeader, Record]:
        """One record that this reader has passed."""
        sealed = self.log.read(seq)
        if sealed is None:
            raise Damaged(f"{self.log.key(seq)} is gone; restore it from a copy")
        signed_by = signer_of(sealed)
        known = [key for key in self.keys if key.keyid == signed_by]
        return self._check(seq, sealed, known[0] if known else self.key)

    def start_at(self, seq: int) -> Checkpoint:
        """Go on behind the `checkpoint` record `seq`, without having read anything before; returns
        it."""
        sealed, keys = self.log.read(seq) or b"", self.keys[:1]
        rotations = rotations_of(sealed)
        for rotation in rotations:
            _, record = open_record(rotation, keys[-1])
            if not isinstance(record, Rotate):
                raise Damaged(
                    f"{self.log.key(seq)}: a {record.KIND} record does not hand over a key"
                )
            keys.append(record.public_key)
        header, record = self._check(seq, sealed, keys[-1])
        if not isinstance(record, Checkpoint):
            raise Damaged(f"{self.log.key(seq)} is not a checkpoint record")
        self.keys, self.rotations = keys, rotations
        self.passed(sealed, header, record)
        return record

    def passed(self, sealed: bytes, header: RecordHeader, record: Record) -> None:
        """The log's end is now behind this record."""
        self.next_seq, self.previous = header.seq + 1, digest_of(sealed)
        if isinstance(record, Rotate):
            self.keys.append(record.public_key)
            self.rotations.append(sealed)

    def _check(self, seq: int, sealed: bytes, key: PublicKey) -> tuple[RecordHeader, Record]:
        try:
            header, record = open_record(sealed, key)
        except Damaged as error:
            raise Damaged(f"{self.log.key(seq)}: {error}") from error
        if (header.population, header.partition, header.seq) != (
            self.population,
            self.partition,
            seq,
        ):
            raise Damaged(f"{self.log.key(seq)} belongs to another place: {header}")
        return header, record
