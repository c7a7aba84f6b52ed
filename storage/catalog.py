"""The catalog: for every adapter its revisions, tip, serving and consumed position. Derived from the revision
logs alone; losing it costs a replay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from populace.storage.errors import InvalidInput
from populace.storage.manifest import (
    BEFORE_ALL,
    AdapterCreated,
    Attempt,
    Claim,
    EventRef,
    Position,
    Record,
    RecordHeader,
    Release,
    RevisionEntry,
    Settled,
    SettledEvent,
    Verdict,
    WaveManifest,
)


@dataclass(slots=True, kw_only=True)
class AdapterState:
    """One adapter as its log describes it. Only `Catalog.apply` changes it."""

    pseudonym: str
    partition: int
    spec: dict[str, Any]
    seed: int
    revisions: dict[int, RevisionEntry] = field(default_factory=dict)
    waves: dict[int, int] = field(default_factory=dict)
    """Revision -> number of the record that committed it."""
    tip: int = 0
    serving: int = 0
    consumed: Position = BEFORE_ALL
    settled: list[SettledEvent] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def next_revision(self) -> int:
        return max(self.revisions, default=0) + 1

    def lineage(self, revision: int) -> list[int]:
        """`revision` and its ancestors down to 0, newest first."""
        chain = [revision]
        while chain[-1] != 0:
            chain.append(self.revisions[chain[-1]].parent)
        return chain

    def require(self, revision: int) -> int:
        if type(revision) is not int:
            raise InvalidInput(f"revision is {revision!r}; give a whole number")
        if revision != 0 and revision not in self.revisions:
            raise InvalidInput(f"revision {revision} does not exist; this adapter has 0 to {self.next_revision - 1}")
        return revision


class Catalog:
    """All adapters of a population."""

    def __init__(self) -> None:
        self.adapters: dict[str, AdapterState] = {}
        self.obeyed: set[tuple[str, str]] = set()
        """(pseudonym, event id) of commands that have their verdict."""
        self.lone_attempts: dict[str, tuple[EventRef, int]] = {}
        """Pseudonym -> the event that was last tried all alone, and how many such attempts have no outcome."""
        self.unfinished: dict[int, Attempt] = {}
        """Per partition: the attempt that no outcome has followed."""
        self.owned: dict[int, bool] = {}
        """Per partition: whether the last claim is still unreleased."""

    def apply(self, header: RecordHeader, record: Record) -> None:
        """The only way the catalog changes."""
        match record:
            case Claim() | Release():
                self.owned[header.partition] = isinstance(record, Claim)
            case AdapterCreated():
                self.adapters[record.pseudonym] = AdapterState(
                    pseudonym=record.pseudonym,
                    partition=header.partition,
                    spec=record.spec,
                    seed=record.seed,
                )
            case Attempt():
                self.unfinished[header.partition] = record
                self._count_lone(record)
            case WaveManifest():
                for entry in record.revisions:
                    self._add_revision(header, entry)
            case Settled():
                adapter = self.adapters[record.pseudonym]
                adapter.settled += record.events
                adapter.consumed = max(adapter.consumed, record.consumed)
                self._finish(header.partition, record.pseudonym)
            case Verdict():
                adapter = self.adapters[record.pseudonym]
                adapter.tip, adapter.serving = record.tip, record.serving
                adapter.verdicts.append(record)
                if record.command is not None:
                    self.obeyed.add((record.pseudonym, record.command))

    def __iter__(self) -> Iterator[AdapterState]:
        return iter(self.adapters.values())

    def get(self, pseudonym: str) -> AdapterState | None:
        return self.adapters.get(pseudonym)

    def _count_lone(self, attempt: Attempt) -> None:
        if len(attempt.adapters) == 1:
            ((pseudonym, refs),) = attempt.adapters.items()
            if len(refs) == 1:
                ref, count = self.lone_attempts.get(pseudonym, (refs[0], 0))
                self.lone_attempts[pseudonym] = (refs[0], count + 1 if ref == refs[0] else 1)

    def _add_revision(self, header: RecordHeader, entry: RevisionEntry) -> None:
        adapter = self.adapters[entry.pseudonym]
        adapter.revisions[entry.revision] = entry
        adapter.waves[entry.revision] = header.seq
        adapter.tip = entry.revision
        adapter.settled += entry.settled
        adapter.consumed = max(adapter.consumed, entry.consumed)
        self._finish(header.partition, entry.pseudonym)

    def _finish(self, partition: int, pseudonym: str) -> None:
        """An attempt ends user by user; what is left when a new owner looks died with the old one."""
        self.lone_attempts.pop(pseudonym, None)
        if (attempt := self.unfinished.get(partition)) is None or pseudonym not in attempt.adapters:
            return
        left = {user: events for user, events in attempt.adapters.items() if user != pseudonym}
        if left:
            self.unfinished[partition] = Attempt(wave=attempt.wave, adapters=left)
        else:
            del self.unfinished[partition]
