"""Verification: walk a population's whole history and read every byte that it names.

Needs no secret: signatures, digests and places are public, and blobs are verified as they are
stored. A swapped key is seen by who pins the root key, a log that was cut off by who keeps the last
known positions.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from populace.storage import paths
from populace.storage.errors import Damaged, InvalidInput, ObjectNotFound
from populace.storage.keys.keyring import PublicKey
from populace.storage.log.pack import BlobPlace, read_blob
from populace.storage.log.reader import RevisionLogReader
from populace.storage.log.records import (
    AdapterCreated,
    Checkpoint,
    RecordBatch,
    Repack,
    RevisionEntry,
    Tombstone,
    Verdict,
    WaveManifest,
)
from populace.storage.objects.contract import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPosition:
    """How far a partition's log was known to go."""

    seq: int
    """Number of its last record; -1 for an empty log."""
    sha256: str
    """Digest of that record."""


@dataclass(slots=True, kw_only=True)
class Findings:
    """What a walk found; `problems` is empty when all is well."""

    num_records: int = 0
    num_revisions: int = 0
    num_blobs: int = 0
    num_bytes: int = 0
    num_not_kept: int = 0
    """Revisions whose weights the retention rule let go: their records stand, nothing of theirs is
    damaged."""
    problems: list[str] = field(default_factory=list)
    positions: dict[int, LogPosition] = field(default_factory=dict)
    """Per partition: to be kept, and handed to the next verification."""


@dataclass(slots=True)
class _Chain:
    """One adapter as the records so far tell it."""

    tip: int = 0
    entries: dict[int, RevisionEntry] = field(default_factory=dict)
    places: dict[tuple[int, str], BlobPlace] = field(default_factory=dict)
    is_forgotten: bool = False


def verify_partition(
    store: ObjectStore,
    population: str,
    partition: int,
    root_key: PublicKey,
    findings: Findings,
    *,
    pseudonym: str | None = None,
    known: LogPosition | None = None,
    progress: Callable[[int], None] = lambda num_blobs: None,
) -> None:
    """Walk one partition from its first record; of one adapter only, if `pseudonym` says so. Adds
    to `findings`."""
    walk = _Walk(RevisionLogReader(store, population, partition, root_key), findings, known)
    walk.follow()
    walk.check_end()
    findings.positions[partition] = LogPosition(
        seq=walk.reader.next_seq - 1, sha256=walk.reader.previous
    )
    walk.check_checkpoints()
    for name in list(walk.chains):
        if pseudonym in (None, name):
            walk.read_blobs(name, progress)


@dataclass(slots=True)
class _Walk:
    """One partition's log, as far as it was followed."""

    reader: RevisionLogReader
    findings: Findings
    known: LogPosition | None
    chains: dict[str, _Chain] = field(default_factory=dict)
    checkpoints: dict[int, str] = field(default_factory=dict)
    known_sha256: str | None = None

    def follow(self) -> None:
        """Take in the records that are new."""
        reader = self.reader
        try:
            for header, record in reader.read_new():
                self.findings.num_records += 1
                if self.known is not None and header.seq == self.known.seq:
                    self.known_sha256 = reader.previous
                if isinstance(record, Checkpoint):
                    self.checkpoints[header.seq] = record.sha256
                where = reader.log.key(header.seq)
                self.findings.problems += [
                    f"{where}: {problem}" for problem in _follow(self.chains, record)
                ]
        except Damaged as error:
            if not any(str(error) in problem for problem in self.findings.problems):
                self.findings.problems.append(f"{error}; records from here on can't be trusted")

    def check_end(self) -> None:
        """A hole looks like the end to a reader, and a cut-off log like a shorter one."""
        reader, known, log = self.reader, self.known, self.reader.log
        end = log.key(reader.next_seq)
        if (
            next(log.store.list(log.prefix, after=end), None) is not None
            and log.read(reader.next_seq) is None
        ):
            self.findings.problems.append(
                f"{end} is missing, but later records are there; restore it from a copy"
            )
        if known is not None and known.seq >= 0 and self.known_sha256 != known.sha256:
            self.findings.problems.append(
                f"{log.key(known.seq)} is not the record that was there when the position was "
                "noted: the log was cut "
                "off or replaced"
            )

    def check_checkpoints(self) -> None:
        """Those that are still there and that a record vouches for."""
        reader = self.reader
        for key in reader.log.store.list(
            paths.checkpoint_folder(reader.population, reader.partition)
        ):
            digest = self.checkpoints.get(paths.seq_of_checkpoint(key))
            with contextlib.suppress(ObjectNotFound):  # replaced by a newer one meanwhile
                if (
                    digest is not None
                    and hashlib.sha256(reader.log.store.get(key)).hexdigest() != digest
                ):
                    self.findings.problems.append(f"{key} is not what its record says; delete it")

    def read_blobs(self, pseudonym: str, progress: Callable[[int], None]) -> None:
        chain, findings = self.chains[pseudonym], self.findings
        findings.num_revisions += len(chain.entries)
        findings.num_not_kept += sum(
            (revision, "weights") not in chain.places for revision in chain.entries
        )
        for name in list(chain.places):
            if (place := chain.places.get(name)) is None:
                continue
            problem = self._problem(place)
            if problem:
                self.follow()  # a repack may have moved or dropped it meanwhile
                moved = chain.places.get(name)
                problem = (
                    "" if moved is None else problem if moved == place else self._problem(moved)
                )
                if problem and not chain.is_forgotten:
                    findings.problems.append(f"{name[1]} of {pseudonym}@{name[0]}: {problem}")
                continue
            findings.num_blobs += 1
            findings.num_bytes += place.size_bytes
            progress(findings.num_blobs)

    def _problem(self, place: BlobPlace) -> str:
        try:
            read_blob(self.reader.log.store, place)
        except (Damaged, ObjectNotFound) as error:
            return str(error)
        return ""


def _follow(chains: dict[str, _Chain], record: Any) -> list[str]:
    """Take one record in; returns what contradicts the records before."""
    match record:
        case AdapterCreated():
            if record.pseudonym in chains:
                return [f"adapter {record.pseudonym} is created a second time"]
            chains[record.pseudonym] = _Chain()
        case WaveManifest():
            return [problem for entry in record.revisions for problem in _extend(chains, entry)]
        case Verdict():
            if (chain := chains.get(record.pseudonym)) is None:
                return [f"a verdict about adapter {record.pseudonym}, which was never created"]
            missing = {
                number
                for number in (record.tip, record.serving)
                if number and number not in chain.entries
            }
            chain.tip = record.tip
            return [
                f"a verdict moves {record.pseudonym} to revision {n}, which does not exist"
                for n in sorted(missing)
            ]
        case RecordBatch():
            return [problem for part in record.records for problem in _follow(chains, part)]
        case Tombstone():
            chains.setdefault(record.pseudonym, _Chain()).is_forgotten = True
        case Repack():
            for moved in record.moved:
                place = chains[moved.pseudonym].places[moved.revision, moved.part]
                if moved.sha256 != place.sha256:
                    return [
                        f"a repack changes the bytes of {moved.part} of "
                        f"{moved.pseudonym}@{moved.revision}"
                    ]
                moved_place = replace(place, pack=record.pack, offset=moved.offset)
                chains[moved.pseudonym].places[moved.revision, moved.part] = moved_place
            for name, revision, part in record.dropped:
                chains[name].places.pop((revision, part), None)
    return []


def _extend(chains: dict[str, _Chain], entry: RevisionEntry) -> list[str]:
    name = f"{entry.pseudonym}@{entry.revision}"
    if (chain := chains.get(entry.pseudonym)) is None:
        return [f"{name} belongs to an adapter that was never created"]
    problems = []
    if entry.revision != len(chain.entries) + 1:
        problems.append(f"{name} follows revision {len(chain.entries)}: a gap or a repetition")
    if entry.parent != chain.tip:
        problems.append(
            f"{name} continues revision {entry.parent}, but the tip is {chain.tip}: an unexplained "
            "fork"
        )
    parent = chain.entries.get(entry.parent)
    if entry.parent_sha256 != (None if parent is None else parent.blobs["weights"].sha256):
        problems.append(
            f"{name} names another digest for its parent {entry.parent} than that revision has"
        )
    if entry.parent_moments_sha256 is not None and (
        parent is None or entry.parent_moments_sha256 != parent.blobs["moments"].sha256
    ):
        problems.append(
            f"{name} names another digest for the moments of its parent {entry.parent} than those "
            "have"
        )
    if chain.is_forgotten:
        problems.append(f"{name} was committed after its user was forgotten")
    chain.entries[entry.revision] = entry
    chain.tip = entry.revision
    chain.places.update({(entry.revision, part): place for part, place in entry.blobs.items()})
    return problems


def positions_from_json(body: Mapping[str, Any]) -> dict[int, LogPosition]:
    """The `positions` of an earlier verification's JSON; `InvalidInput` if it is something else."""
    try:
        return {
            int(partition): LogPosition(**position)
            for partition, position in body["positions"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(
            f"not the JSON of an earlier `populace verify --all --json`: {error!r}"
        ) from None
