"""What the population page shows, as values; free of HTTP and of Ray."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from populace.population.client import Population
from populace.population.ledger.ledger import Ledger
from populace.population.ledger.queries import (
    ParkedEvent,
    RevisionInfo,
    initial_info,
    parked_events,
    parked_in,
    revision_info,
    settling_records,
)
from populace.population.tools.diff import ModuleNorms, diff_revisions
from populace.population.watching.beacon import NAME_DIGITS, SeenController, controllers_of
from populace.population.watching.rates import ControllerRates, Watch
from populace.storage.catalog.states import AdapterState, RevisionState
from populace.storage.errors import Damaged, Forgotten, InvalidInput, ObjectNotFound
from populace.storage.log.records import (
    Decision,
    Record,
    RecordHeader,
    SettledEvent,
    Verdict,
    WaveManifest,
    parts_of,
)

MAX_REVISIONS = 100

NUM_RECENT = 20

FRESH_S = 2.0
"""How old what is shown may be."""

MAX_CACHED = 20_000

MIN_DIGITS = 6
"""Digits of a pseudonym that a search needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionView:
    """One row of a user's chain: a revision, and what the page shows beside it."""

    info: RevisionInfo
    verdicts: tuple[Verdict, ...] = ()
    is_pinned: bool = False
    size_bytes: int = 0
    """Size of its weights, moments and evidence in the store."""

    @property
    def committed(self) -> str:
        """Day and time, UTC; empty where it isn't known."""
        seconds = self.info.committed_at
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}" if seconds else ""

    @property
    def marks(self) -> tuple[str, ...]:
        info = self.info
        states = {
            "serving": info.is_serving,
            "tip": info.is_tip,
            "pinned": self.is_pinned,
            "dropped": not info.is_kept,
        }
        return tuple(name for name, holds in states.items() if holds)

    @property
    def can_return(self) -> bool:
        """Whether a rollback to it would change something."""
        return self.info.is_kept and not (self.info.is_tip and self.info.is_serving)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserView:
    """One user's page."""

    user: str
    pseudonym: str
    partition: int
    rank: int
    tip: int
    serving: int
    residency: str
    revisions: tuple[RevisionView, ...]
    """Newest first."""
    num_older: int

    @property
    def before(self) -> int:
        """What the tip is most usefully compared with."""
        parents = [item.info.parent for item in self.revisions if item.info.is_tip]
        return self.serving if self.serving != self.tip else (parents[0] or 0 if parents else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentAdapter:
    """An adapter that changed lately."""

    user: str
    tip: int
    serving: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What one record of the revision log says of one adapter."""

    written_at: float
    metrics: Mapping[int, Mapping[str, float]]
    """By revision."""
    parked: tuple[SettledEvent, ...]
    verdicts: tuple[Verdict, ...]


class PopulationReader:
    """Reads a population for many requests at once: one look at the logs every `FRESH_S`, records
    kept."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self._lock, self._watch = threading.Lock(), Watch()
        self._read_s = -FRESH_S
        self._seen: tuple[float, list[ControllerRates]] = (-FRESH_S, [])
        self._cache: OrderedDict[tuple[str, int], About] = OrderedDict()

    def find(self, query: str) -> str:
        """The user with this id, or whose pseudonym begins with it. `InvalidInput` if there is
        none."""
        with self._reading():
            ledger = self.population.ledger
            try:
                ledger.adapter(query)
                return query
            except InvalidInput:
                if len(query) < MIN_DIGITS or set(query) - set("0123456789abcdef"):
                    raise
            table = ledger.catalog.adapters
            low, high = int(query[:16].ljust(16, "0"), 16), int(query[:16].ljust(16, "f"), 16)
            rows = np.flatnonzero(
                (table["high"] >= low) & (table["high"] <= high) & (table["flags"] == 0)
            )
            names = [
                name for name in ledger.catalog.pseudonyms(rows[:1000]) if name.startswith(query)
            ]
            if len(names) != 1:
                found = (
                    f"{len(names)} pseudonyms begin with it"
                    if names
                    else "no pseudonym begins with it either"
                )
                raise InvalidInput(f"no user {query!r} with an adapter, and {found}")
            return ledger.keys.get(names[0]).user

    def user(self, user: str) -> UserView:
        """Everything about one user."""
        controllers = self.controllers()
        with self._reading():
            ledger = self.population.ledger
            adapter = ledger.adapter(user)
            states = ledger.catalog.revisions_of(adapter.pseudonym)
            shown = states[-MAX_REVISIONS:]
            oldest = shown[0].revision if len(shown) < len(states) else 0
            verdicts = self._verdicts(adapter, oldest)
            views = [
                self._revision(adapter, state, verdicts.get(state.revision, ()))
                for state in reversed(shown)
            ]
            if not oldest:
                first = verdicts.get(0, ())
                views.append(RevisionView(info=initial_info(adapter, first), verdicts=first))
            return UserView(
                user=user,
                pseudonym=adapter.pseudonym,
                partition=adapter.partition,
                rank=adapter.spec["rank"],
                tip=adapter.tip,
                serving=adapter.serving,
                residency=_residency(
                    ledger, adapter, [item.seen for item in controllers if not item.is_silent]
                ),
                revisions=tuple(views),
                num_older=len(states) - len(shown),
            )

    def parked(self, user: str) -> list[ParkedEvent]:
        """Parked events in the newest `MAX_REVISIONS` records that settled something of the user,
        oldest first."""
        with self._reading():
            ledger = self.population.ledger
            adapter = ledger.adapter(user)
            records = settling_records(ledger.catalog, adapter)[-MAX_REVISIONS:]
            parked = [
                (adapter.pseudonym, item)
                for seq in records
                for item in self._about(adapter, seq).parked
            ]
            return parked_events(ledger, parked)

    def look_again(self) -> None:
        """Something was changed: what is shown next must know."""
        self._read_s = -FRESH_S

    def manifest(self, user: str, revision: int) -> Mapping[str, object]:
        with self._reading():
            return self.population.manifest(user, revision)

    def diff(self, user: str, before: int, after: int) -> list[ModuleNorms]:
        with self._reading():
            return diff_revisions(self.population, user, before, after)

    def totals(self) -> list[tuple[str, str]]:
        """Counts over the population."""
        with self._reading():
            catalog, meta = self.population.ledger.catalog, self.population.meta
            decisions = catalog.count_decisions()
            figures = {
                "adapters": len(catalog),
                "revisions": catalog.revisions.size,
                "promoted": decisions[Decision.PROMOTE],
                "rejected": decisions[Decision.REJECT],
                "rolled back": decisions[Decision.ROLLBACK],
                "settled events": catalog.num_settled.total(),
                "forgotten": len(catalog.forgotten()),
            }
            return [("base", meta.base), *((name, f"{count:,}") for name, count in figures.items())]

    def recent(self) -> list[RecentAdapter]:
        """The adapters whose partitions' logs named them last, newest first within each."""
        with self._reading():
            ledger = self.population.ledger
            table = ledger.catalog.adapters
            living = np.flatnonzero(table["flags"] == 0)
            order = living[np.argsort(table["changed"][living], kind="stable")[::-1]]
            found = []
            for row in order[: 2 * NUM_RECENT].tolist():
                adapter = ledger.catalog.state(row)
                try:
                    user = ledger.keys.get(adapter.pseudonym).user
                except (Forgotten, ObjectNotFound, Damaged):  # of one user; the others are shown
                    continue
                rank = adapter.spec["rank"]
                found.append(
                    RecentAdapter(user=user, tip=adapter.tip, serving=adapter.serving, rank=rank)
                )
            return found[:NUM_RECENT]

    def controllers(self) -> list[ControllerRates]:
        """What runs, looked at once every `FRESH_S` at most."""
        with self._lock:
            seen_s, rates = self._seen
            if time.monotonic() - seen_s >= FRESH_S:
                rates = self._watch.look(
                    controllers_of(self.population.store, self.population.meta.name)
                )
                self._seen = (time.monotonic(), rates)
            return rates

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One request at a time, of what is fresh."""
        with self._lock:
            if time.monotonic() - self._read_s >= FRESH_S:
                self.population.ledger.follow()
                self._read_s = time.monotonic()
            yield

    def _about(self, adapter: AdapterState, seq: int) -> About:
        """What a record says of one adapter; of a wave of many, only that is kept."""
        key = (adapter.pseudonym, seq)
        if key not in self._cache:
            header, record = self.population.ledger.readers[adapter.partition].read_at(seq)
            self._cache[key] = about(header, record, adapter.pseudonym)
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return self._cache[key]

    def _verdicts(self, adapter: AdapterState, oldest: int) -> dict[int, tuple[Verdict, ...]]:
        found: dict[int, tuple[Verdict, ...]] = {}
        for note in self.population.ledger.catalog.notes_of(adapter.pseudonym):
            if note.decision == "settled" or note.judged < oldest:
                continue
            for record in self._about(adapter, note.seq).verdicts:
                if record not in found.get(record.judged, ()):
                    found[record.judged] = (*found.get(record.judged, ()), record)
        return found

    def _revision(
        self, adapter: AdapterState, state: RevisionState, verdicts: tuple[Verdict, ...]
    ) -> RevisionView:
        found = self._about(adapter, state.seq)
        metrics = found.metrics.get(state.revision, {})
        return RevisionView(
            info=revision_info(adapter, state, found.written_at, metrics, verdicts),
            verdicts=verdicts,
            is_pinned=state.is_pinned,
            size_bytes=sum(place.size_bytes for place in state.blobs.values()),
        )


def about(header: RecordHeader, whole: Record, pseudonym: str) -> About:
    """What there is in a record about one adapter."""
    metrics: dict[int, Mapping[str, float]] = {}
    verdicts: list[Verdict] = []
    for record in parts_of(whole):
        if isinstance(record, WaveManifest):
            metrics |= {
                entry.revision: entry.metrics
                for entry in record.revisions
                if entry.pseudonym == pseudonym
            }
        elif isinstance(record, Verdict) and record.pseudonym == pseudonym:
            verdicts.append(record)
    parked = tuple(item for name, item in parked_in(whole) if name == pseudonym)
    return About(
        written_at=header.written_at, metrics=metrics, parked=parked, verdicts=tuple(verdicts)
    )


def _residency(ledger: Ledger, adapter: AdapterState, controllers: Sequence[SeenController]) -> str:
    """Where the tip's bytes are, as far as it shows: shards tell who is hot, not who is warm."""
    for seen in controllers:
        if adapter.pseudonym[:NAME_DIGITS] in seen.figures.hot:
            return f"hot at controller {seen.name}"
    if adapter.tip == 0:
        return "nowhere: revision 0 is made from its seed"
    size = sum(
        place.size_bytes
        for place in ledger.catalog.revision_of(adapter.pseudonym, adapter.tip).blobs.values()
    )
    return f"not among the hot ones; {size / 1e3:,.0f} kB of the tip in the store"
