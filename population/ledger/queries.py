"""What the logs say, as values: counts, revisions, parked events, manifests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from populace.population.ledger.ledger import Ledger
from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.states import AdapterState, Note, RevisionState
from populace.storage.errors import Forgotten, InvalidInput
from populace.storage.log.manifest import payload_of
from populace.storage.log.reader import RevisionLogReader
from populace.storage.log.records import (
    Decision,
    Position,
    ReasonKind,
    Record,
    Settled,
    SettledEvent,
    Verdict,
    WaveManifest,
    parts_of,
)


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
    """Wait of the user who has waited longest for an update."""
    heldout_tasks: int
    settled_events: int
    forgotten: int
    """Users who were erased: nothing of theirs can be read any more."""
    running: bool
    """Whether a controller holds the partitions, or died without releasing them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionInfo:
    """One revision of one adapter.

    Example: `RevisionInfo(revision=3, parent=2, is_tip=True, is_serving=False, …)` was trained on
    top of revision 2 and has no verdict yet."""

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
    """Place in the experience log of the user's partition."""
    reason: str
    detail: str
    """What the user's reward said."""


def status_of(ledger: Ledger) -> PopulationStatus:
    """Counts of everything that `ledger` has read."""
    catalog, pending = ledger.catalog, ledger.pending
    decisions = catalog.count_decisions()
    return PopulationStatus(
        name=ledger.meta.name,
        base=ledger.meta.base,
        users=len({*pending.pseudonyms(), *(adapter.pseudonym for adapter in catalog)}),
        adapters=len(catalog),
        revisions=catalog.revisions.size,
        promoted=decisions[Decision.PROMOTE],
        rejected=decisions[Decision.REJECT],
        pending_events=pending.num_pending(),
        oldest_wait_s=round(pending.oldest_wait_s(), 1),
        heldout_tasks=pending.num_heldout(),
        settled_events=catalog.num_settled.total(),
        forgotten=len(catalog.forgotten()),
        running=any(catalog.owned.values()),
    )


def revision_infos(ledger: Ledger, adapter: AdapterState) -> list[RevisionInfo]:
    """An adapter's revisions from 0 on."""
    notes = [
        note for note in ledger.catalog.notes_of(adapter.pseudonym) if note.decision != "settled"
    ]
    infos = [initial_info(adapter, [note for note in notes if note.judged == 0])]
    for state in ledger.catalog.revisions_of(adapter.pseudonym):
        header, wave = ledger.commit_of(adapter, state.revision)
        metrics = wave.entry(adapter.pseudonym, state.revision).metrics
        own = [note for note in notes if note.judged == state.revision]
        infos.append(revision_info(adapter, state, header.written_at, metrics, own))
    return infos


def initial_info(adapter: AdapterState, verdicts: Sequence[Note | Verdict]) -> RevisionInfo:
    """Revision 0, which has no record and no bytes."""
    return RevisionInfo(
        revision=0,
        parent=None,
        is_tip=adapter.tip == 0,
        is_serving=adapter.serving == 0,
        is_kept=True,
        committed_at=None,
        num_events=0,
        metrics={},
        verdicts=tuple(verdict.decision for verdict in verdicts),
    )


def revision_info(
    adapter: AdapterState,
    state: RevisionState,
    written_at: float,
    metrics: Mapping[str, float],
    verdicts: Sequence[Note | Verdict],
) -> RevisionInfo:
    """A committed revision; `written_at` and `metrics`: as its wave record says."""
    return RevisionInfo(
        revision=state.revision,
        parent=state.parent,
        is_tip=state.revision == adapter.tip,
        is_serving=state.revision == adapter.serving,
        is_kept=state.is_kept,
        committed_at=written_at or None,
        num_events=state.num_trained,
        metrics=metrics,
        verdicts=tuple(verdict.decision for verdict in verdicts),
    )


def manifest_of(ledger: Ledger, adapter: AdapterState, revision: int) -> dict[str, Any]:
    """The payload of the record that committed a revision; it stays when the bytes are dropped."""
    if type(revision) is not int or not adapter.exists(revision):
        ledger.catalog.loadable(adapter, revision)
    if revision == 0:
        raise InvalidInput(
            "revision 0 has no manifest: it is the initialisation from the adapter's seed"
        )
    seq = ledger.catalog.revision_of(adapter.pseudonym, revision).seq
    sealed = ledger.readers[adapter.partition].log.read(seq)
    assert sealed is not None
    return payload_of(sealed)


def revision_number(catalog: Catalog, adapter: AdapterState, revision: int | str) -> int:
    """The number that `serving`, `tip`, a number or its digits mean; `InvalidInput` for what can't
    be loaded."""
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


# Parked events.


def parked_of_all(ledger: Ledger) -> list[ParkedEvent]:
    """Every parked event, oldest first within a partition. Reads the whole history."""
    found = []
    for partition, own in ledger.readers.items():
        reader = RevisionLogReader(ledger.store, own.population, partition, own.keys[0])
        for _, record in reader.read_new():
            found += parked_events(ledger, parked_in(record))
    return found


def parked_of(ledger: Ledger, adapter: AdapterState) -> list[ParkedEvent]:
    """An adapter's parked events, oldest first."""
    reader = ledger.readers[adapter.partition]
    records = (reader.read_at(seq)[1] for seq in settling_records(ledger.catalog, adapter))
    pairs = [pair for record in records for pair in parked_in(record)]
    return parked_events(ledger, [pair for pair in pairs if pair[0] == adapter.pseudonym])


def parked_events(
    ledger: Ledger, pairs: Iterator[tuple[str, SettledEvent]] | Sequence[tuple[str, SettledEvent]]
) -> list[ParkedEvent]:
    """(pseudonym, event) pairs with what only the users' keys open; those of erased users are left
    out."""
    found = []
    for pseudonym, item in pairs:
        with contextlib.suppress(Forgotten):
            user = ledger.keys.get(pseudonym).user
            detail = ledger.seals.detail(pseudonym, item)
            position = item.event.position
            found.append(
                ParkedEvent(user=user, position=position, reason=item.reason, detail=detail)
            )
    return found


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
        yield from (pair for pair in settled if pair[1].kind is ReasonKind.PARKED)


def settling_records(catalog: Catalog, adapter: AdapterState) -> list[int]:
    """Numbers of the records that may have settled something of this adapter, oldest first."""
    notes = catalog.notes_of(adapter.pseudonym)
    settled = {note.seq for note in notes if note.decision == "settled"}
    return sorted(settled | {state.seq for state in catalog.revisions_of(adapter.pseudonym)})
