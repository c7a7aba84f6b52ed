"""What the logs say, as values: status, revisions, parked events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.states import AdapterState, Note
from populace.storage.errors import InvalidInput
from populace.storage.identity import PopulationMeta
from populace.storage.log.reader import RevisionLogReader
from populace.storage.log.records import (
    Position,
    Record,
    Settled,
    SettledEvent,
    WaveManifest,
    parts_of,
)
from populace.storage.objects.contract import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class PopulationStatus:
    """Counts over the whole population, from the logs alone."""

    name: str
    base: str
    users: int
    adapters: int
    revisions: int
    promoted: int
    rejected: int
    pending_events: int
    oldest_wait_s: float
    """Of the user who has waited longest for an update."""
    heldout_tasks: int
    settled_events: int
    forgotten: int
    """Users of whom nothing can be read any more."""
    running: bool
    """Whether a controller holds the partitions, or died without releasing them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionInfo:
    """One revision of one adapter."""

    revision: int
    parent: int | None
    is_tip: bool
    is_serving: bool
    is_kept: bool
    """Whether its weights are still in the store; a retention rule drops old ones."""
    committed_at: float | None
    """Seconds since 1970 by its controller's clock; None for revision 0, and in logs of before this
    was recorded."""
    num_events: int
    metrics: Mapping[str, float]
    verdicts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedEvent:
    """An event that was given up, and why."""

    user: str
    position: Position
    """Its place in the experience log of the user's partition."""
    reason: str
    detail: str
    """What the user's reward said."""


def parked_events(
    store: ObjectStore, meta: PopulationMeta, partition: int
) -> Iterator[tuple[str, SettledEvent]]:
    """(pseudonym, event) of everything that was parked in a partition, oldest first."""
    reader = RevisionLogReader(store, meta.name, partition, meta.root_key)
    for _, record in reader.read_new():
        yield from parked_in(record)


def settling_records(catalog: Catalog, adapter: AdapterState) -> list[int]:
    """Numbers of the records that may have settled something of this adapter, oldest first."""
    settled = {
        note.seq for note in catalog.notes_of(adapter.pseudonym) if note.decision == "settled"
    }
    return sorted(settled | {state.seq for state in catalog.revisions_of(adapter.pseudonym)})


def parked_in(whole: Record) -> Iterator[tuple[str, SettledEvent]]:
    """(pseudonym, event) of everything that one record parks."""
    for record in parts_of(whole):
        settled: list[tuple[str, SettledEvent]] = []
        if isinstance(record, WaveManifest):
            settled = [
                (entry.pseudonym, item) for entry in record.revisions for item in entry.settled
            ]
        elif isinstance(record, Settled):
            settled = [(record.pseudonym, item) for item in record.events]
        yield from (
            (pseudonym, item) for pseudonym, item in settled if item.reason.startswith("parked: ")
        )


def revision_number(catalog: Catalog, adapter: AdapterState, revision: int | str) -> int:
    match revision:
        case "serving":
            return adapter.serving
        case "tip":
            return adapter.tip
        case int():
            return catalog.loadable(adapter, revision)
        case _ if str(revision).isdigit():
            return catalog.loadable(adapter, int(revision))
    raise InvalidInput(f"revision is {revision!r}; use serving, tip or a number")


def _verdicts(notes: Sequence[Note], revision: int) -> tuple[str, ...]:
    return tuple(
        note.decision for note in notes if note.decision != "settled" and note.judged == revision
    )
