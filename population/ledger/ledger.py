"""A population's durable state seen from one process: its logs, and the catalog and pending index
derived from them.

    revision logs    -> follow -> Catalog, PendingIndex      records that are new, in order
    experience logs  -> read_experience -> PendingIndex      events that are new, in order
    append           -> revision log, then as if followed    partitions that this process owns

Reading needs no permission. Writing a partition's revision log needs a claim (`ownership.py`), and
the log itself fences whoever claimed before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Sequence

from populace.configs.schema import Settings
from populace.population.experience.consumer import Consumer, Reading
from populace.population.experience.sealing import LoggedEvent, Seals
from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.checkpoint import restore
from populace.storage.catalog.states import AdapterState
from populace.storage.errors import Forgotten, InvalidInput, ObjectNotFound
from populace.storage.identity import PopulationMeta
from populace.storage.log.owner import Owner
from populace.storage.log.reader import RevisionLogReader
from populace.storage.log.records import (
    Claim,
    Position,
    Record,
    RecordHeader,
    RevisionEntry,
    Tombstone,
    WaveManifest,
    batched,
    parts_of,
)
from populace.storage.objects.contract import ObjectStore
from populace.workers.batch import AdapterRef, revision_ref


class Ledger:
    """Logs and catalog of one population."""

    def __init__(
        self,
        store: ObjectStore,
        meta: PopulationMeta,
        seals: Seals,
        settings: Settings | None = None,
    ) -> None:
        """Reads the revision logs; experience is read by `refresh` and `read_experience`."""
        self.store, self.meta, self.seals, self.keys = store, meta, seals, seals.keys
        reading = Reading.of(store, meta, seals, settings or Settings())
        self.catalog = Catalog(seals.mask_seed)
        self.pending = reading.index
        partitions = range(meta.partitions)
        self.consumers = {p: Consumer(p, reading) for p in partitions}
        self.readers = {
            p: RevisionLogReader(store, meta.name, p, meta.root_key) for p in partitions
        }
        self.owners: dict[int, Owner] = {}
        """Partitions that this process owns; `Ownership` alone changes it."""
        self.claims: dict[int, tuple[str, float]] = {}
        """Partition -> whose the last claim is, and when this process saw it."""
        self.is_selective = False
        """Whether only owned partitions' experience is read: once there was a claim."""
        self.checkpointed: dict[int, int] = {}
        """Partition -> number of its last checkpoint's record."""
        for partition, reader in self.readers.items():
            if (seq := restore(reader, self.catalog)) is not None:
                self.checkpointed[partition] = seq
        self.follow()

    # Following the logs.

    def follow(self, partitions: Collection[int] | None = None) -> None:
        """Read the revision logs of these partitions; None: of those that this process doesn't
        write."""
        others = self.readers.keys() - self.owners.keys()
        for partition in others if partitions is None else partitions:
            for header, record in self.readers[partition].read_new():
                self.apply(header, record)

    def read_experience(self) -> int:
        """Take in newly enqueued events, of the owned partitions once there was a claim; returns
        how many."""
        partitions = self.owned() if self.is_selective else self.readers
        return sum(self.consumers[partition].observe(self.catalog) for partition in partitions)

    def refresh(self) -> None:
        """`follow`, and read new experience. Partitions that this process owns have nothing new
        from others."""
        for turn in range(3):
            self.follow()
            try:
                self.read_experience()
                return
            except ObjectNotFound:  # a snapshot was replaced; the record that says so is there now
                if turn == 2:
                    raise

    def apply(self, header: RecordHeader, record: Record) -> None:
        """Let the catalog and the pending index follow a record that is in the log."""
        self.catalog.apply(header, record)
        for part in parts_of(record):
            self.pending.follow(part)
            if isinstance(part, Claim):
                self.claims[header.partition] = (part.owner, time.monotonic())
            if isinstance(part, Tombstone):
                self.consumers[header.partition].forget(part.pseudonym)
                self.keys.drop([part.pseudonym])

    # Appending.

    def owned(self) -> list[int]:
        """Partitions that this process may write."""
        return sorted(self.owners)

    def append(self, partition: int, record: Record) -> None:
        """Commit `record` and apply it to the catalog."""
        self.apply(self.owners[partition].append(record), record)

    def append_all(self, records: Sequence[tuple[int, Record]]) -> None:
        """Commit (partition, record) pairs, one atomic batch per partition, and apply them."""
        by_partition: dict[int, list[Record]] = {}
        for partition, record in records:
            by_partition.setdefault(partition, []).append(record)
        for partition, own in by_partition.items():
            self.append(partition, batched(own))

    # Looking things up.

    def pseudonym(self, user: str) -> str:
        """The name under which `user` stands in the logs."""
        return self.seals.pseudonym(user)

    def adapter(self, user: str) -> AdapterState:
        """The adapter of `user`; `InvalidInput` if there is none yet, `Forgotten` if there is none
        any more."""
        pseudonym = self.pseudonym(user)
        found = self.catalog.get(pseudonym)
        if found is not None:
            return found
        if self.catalog.is_forgotten(pseudonym):
            raise Forgotten(
                f"user {user!r} was forgotten; nothing of theirs can be read or written again"
            )
        raise InvalidInput(
            f"user {user!r} has no adapter in population {self.meta.name!r} yet; adapters are "
            "created when a run first learns from a user's experience"
        )

    def events(self, partition: int, positions: Sequence[Position]) -> list[LoggedEvent]:
        """Events at their places in a partition's log, in that order; without those of erased
        users."""
        found = self.consumers[partition].load(positions, self.catalog)
        return [found[position] for position in positions if position in found]

    def commit_of(self, adapter: AdapterState, revision: int) -> tuple[RecordHeader, WaveManifest]:
        """The record that committed a revision above 0; read from the log."""
        seq = self.catalog.revision_of(adapter.pseudonym, revision).seq
        header, wave = self.readers[adapter.partition].read_at(seq)
        assert isinstance(wave, WaveManifest)
        return header, wave

    def entry(self, adapter: AdapterState, revision: int) -> RevisionEntry:
        """All that the wave record says of a revision above 0."""
        return self.commit_of(adapter, revision)[1].entry(adapter.pseudonym, revision)

    def ref(self, adapter: AdapterState, revision: int) -> AdapterRef:
        """How workers find a revision's bytes; `InvalidInput` if they were dropped."""
        self.catalog.loadable(adapter, revision)
        state = self.catalog.revision_of(adapter.pseudonym, revision) if revision else None
        return revision_ref(adapter, state)

    def users(self) -> dict[str, str]:
        """Pseudonym -> user id, for every user with experience or an adapter."""
        known = {*self.pending.pseudonyms(), *(adapter.pseudonym for adapter in self.catalog)}
        found = {}
        for pseudonym in known:
            with contextlib.suppress(Forgotten):
                found[pseudonym] = self.keys.get(pseudonym).user
        return found
