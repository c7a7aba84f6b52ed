"""Replay: a revision made again, alone, from the bytes it started from and the evidence it learned
from.

A user's update depends on that user alone, so the same bytes must come out as in the wave that it
was part of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from populace.configs.schema import OptimizerSettings, TrainSettings
from populace.population.client import Population
from populace.population.sampler import replaying_engine
from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.states import AdapterState, RevisionState
from populace.storage.errors import Damaged, InvalidInput, ObjectNotFound
from populace.storage.log.loading import BlobRequest, load_wave
from populace.storage.log.records import RevisionEntry, WaveManifest
from populace.workers.actors.engine import ShardEngine
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    AdapterRef,
    AdapterUpdate,
    UpdateStatus,
    WaveBatch,
    revision_ref,
)
from populace.workers.evidence import decode_evidence
from populace.workers.step.optimizer import optimizer_name


class ReplayOutcome(StrEnum):
    """What came of a replay."""

    SAME = "same bytes"
    DIFFERENT = "DIFFERENT"
    NOT_KEPT = "not kept"
    """Bytes that it needs were dropped by the retention rule."""
    REFUSED = "refused"
    """This machine, or these numerics, can't promise the bits."""
    DAMAGED = "damaged"


_MACHINE = (
    "device", "cpu", "gpu", "compute_capability", "cuda", "cublas", "dtype", "torch",
    "transformers", "kernels", "backend", "numerics",
)  # fmt: skip
"""Fields of a numerics fingerprint that must agree where either has them, beside the optimizer,
which is set as the manifest says. A driver runs what was compiled: it may differ."""

_Computes = tuple[str, str, str]
"""Device, dtype and backend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What came of one revision's replay."""

    revision: int
    outcome: ReplayOutcome
    detail: str

    @property
    def is_same(self) -> bool:
        return self.outcome is ReplayOutcome.SAME


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How a revision is re-derived: from a revision whose bytes are kept, by every update after it.

    Example: to revision 5, of which only 3 and 5 are kept: `Route(start=<3>, updates=(4, 5))`."""

    start: AdapterRef
    updates: tuple[RevisionEntry, ...]


def replay(population: Population, user: str, revision: int | None = None) -> list[Replayed]:
    """Re-derive one revision, or every kept one, oldest first. A route that passes other kept
    revisions compares them on its way. Nothing is written."""
    population.ledger.follow()
    adapter = population.ledger.adapter(user)
    catalog = population.ledger.catalog
    kept = [state.revision for state in catalog.revisions_of(adapter.pseudonym) if state.is_kept]
    if revision is not None and (revision == 0 or not adapter.exists(revision)):
        raise InvalidInput(
            f"revision is {revision}; give one of 1 to {adapter.next_revision - 1}, 0 is derived "
            "already"
        )
    wanted = kept if revision is None else [revision]
    found: dict[int, Replayed] = {}
    player = _Player(population, adapter)
    for number in sorted(wanted, reverse=True):
        if number in found:
            continue
        if number not in kept:
            found[number] = Replayed(
                revision=number,
                outcome=ReplayOutcome.NOT_KEPT,
                detail="the retention rule let its weights go",
            )
            continue
        compare = kept if revision is None else [number]
        try:
            try:
                found |= player.play(number, compare)
            except ObjectNotFound:  # a repack moved its bytes meanwhile, or they are really gone
                population.ledger.follow()
                found |= player.play(number, compare)
        except (Damaged, ObjectNotFound) as error:
            found[number] = Replayed(
                revision=number, outcome=ReplayOutcome.DAMAGED, detail=str(error)
            )
    assert set(wanted) <= set(found)
    return [found[number] for number in sorted(found)]


def route_to(
    catalog: Catalog, adapter: AdapterState, revision: int, entry_of: Callable[[int], RevisionEntry]
) -> Route | str:
    """The shortest route to a kept revision, or which bytes are missing for it."""
    updates: list[RevisionEntry] = []
    number = revision
    while True:
        if "evidence" not in catalog.revision_of(adapter.pseudonym, number).blobs:
            return f"the evidence of revision {number} is gone"
        updates.append(entry := entry_of(number))
        if entry.parent == 0:
            start = revision_ref(adapter, None)
            break
        parent = catalog.revision_of(adapter.pseudonym, entry.parent)
        moments = parent.blobs.get("moments")
        is_start = entry.parent_moments_sha256 is None or (
            moments is not None and moments.sha256 == entry.parent_moments_sha256
        )
        if parent.is_kept and is_start:
            start = revision_ref(adapter, parent)
            if entry.parent_moments_sha256 is None:
                start = replace(start, moments=None)
            break
        number = entry.parent
    return Route(start=start, updates=tuple(reversed(updates)))


class _Player:
    """Plays routes of one adapter on engines like those that made it."""

    def __init__(self, population: Population, adapter: AdapterState) -> None:
        self.population, self.adapter = population, adapter
        self._waves: dict[int, WaveManifest] = {}
        self._engines: dict[_Computes, ShardEngine] = {}

    def play(self, revision: int, compare: Sequence[int]) -> dict[int, Replayed]:
        """Outcomes of `revision` and of those of `compare` on the way to it."""
        route = route_to(self.population.ledger.catalog, self.adapter, revision, self._entry)
        if isinstance(route, str):
            return {
                revision: Replayed(revision=revision, outcome=ReplayOutcome.NOT_KEPT, detail=route)
            }
        engine = self._engine_for(route)
        if isinstance(engine, str):
            return {
                revision: Replayed(revision=revision, outcome=ReplayOutcome.REFUSED, detail=engine)
            }
        engine.page_in([route.start], True)
        try:
            return self._repeat(engine, route, compare)
        finally:
            engine.evict(
                [key for key in engine.slab.slots if key.pseudonym == self.adapter.pseudonym]
            )

    def _repeat(
        self, engine: ShardEngine, route: Route, compare: Sequence[int]
    ) -> dict[int, Replayed]:
        """Make the route's updates in order, in the slot of its start; outcomes of those in
        `compare`."""
        found: dict[int, Replayed] = {}
        key = route.start.key
        for steps, entry in enumerate(route.updates, 1):
            update = self._update(engine, entry, key)
            if entry.revision in compare:
                detail = self._difference(entry, update)
                found[entry.revision] = Replayed(
                    revision=entry.revision,
                    outcome=ReplayOutcome.DIFFERENT if detail else ReplayOutcome.SAME,
                    detail=detail or _how_far(steps, route.start.key.revision),
                )
            if update.status is not UpdateStatus.UPDATED:
                lost = f"revision {entry.revision} on the way ends as {str(update.status)!r}"
                for later in {step.revision for step in route.updates} & set(compare) - set(found):
                    found[later] = Replayed(
                        revision=later, outcome=ReplayOutcome.DIFFERENT, detail=lost
                    )
                return found
            engine.committed([(key, key := AdapterKey(key.pseudonym, entry.revision))])
        return found

    def _update(self, engine: ShardEngine, entry: RevisionEntry, key: AdapterKey) -> AdapterUpdate:
        """Train the adapter in its slot, alone, on the evidence of `entry`."""
        if entry.parent_moments_sha256 is None:
            engine.slab.forget_moments(key)
        groups = decode_evidence(bytes(self._blob(entry.revision, "evidence")))
        batch = WaveBatch(adapters=(AdapterBatch(adapter=key, groups=groups),))
        (update,) = engine.train_wave(batch, *_hyperparameters(self._wave(entry.revision))).updates
        return update

    def _difference(self, entry: RevisionEntry, update: AdapterUpdate) -> str:
        """What is not as it was committed; empty if all that is kept is."""
        if update.status is not UpdateStatus.UPDATED:
            return f"the update ends as {str(update.status)!r}"
        if list(update.experts) != list(entry.experts):
            return f"other experts were reached: {list(update.experts)}, not {list(entry.experts)}"
        kept = self._state(entry.revision).blobs
        for part in ("weights", "moments"):
            if part in kept and self._blob(entry.revision, part) != getattr(update, part):
                return f"{part} differ"
        return ""

    def _blob(self, revision: int, part: str) -> memoryview:
        place = self._state(revision).blobs[part]
        request = BlobRequest(
            pseudonym=self.adapter.pseudonym, revision=revision, part=part, place=place
        )
        (blob,) = load_wave(self.population.store, self.population.ledger.keys, [request])
        return blob

    def _state(self, revision: int) -> RevisionState:
        return self.population.ledger.catalog.revision_of(self.adapter.pseudonym, revision)

    def _wave(self, revision: int) -> WaveManifest:
        if revision not in self._waves:
            self._waves[revision] = self.population.ledger.commit_of(self.adapter, revision)[1]
        return self._waves[revision]

    def _entry(self, revision: int) -> RevisionEntry:
        return self._wave(revision).entry(self.adapter.pseudonym, revision)

    def _engine_for(self, route: Route) -> ShardEngine | str:
        """An engine that computes as the one that made the route's revisions did, or why there is
        none."""
        made_by = [self._wave(entry.revision).numerics for entry in route.updates]
        if any(numerics.get("numerics") != "invariant" for numerics in made_by):
            return "made with `fast` numerics: its bits depend on who shared the batch"
        ways = {(own["device"], own["dtype"], own["backend"]) for own in made_by}
        for field in ("device", "dtype", "backend"):
            if len({numerics[field] for numerics in made_by}) > 1:
                return f"made partly with one {field}, partly with another"
        (way,) = ways
        try:
            engine = self._engine(way)
        except InvalidInput as error:
            return f"made with device {way[0]}: {error}"
        _, here = engine.describe()
        for entry, numerics in zip(route.updates, made_by, strict=True):
            _, optimizer = _hyperparameters(self._wave(entry.revision))
            own = {**here, "optimizer": optimizer_name(optimizer)}
            for field in (*_MACHINE, "optimizer"):
                if numerics.get(field) != own.get(field):
                    return (
                        f"made with {field} {numerics.get(field)}, this machine has "
                        f"{own.get(field)}"
                    )
        return engine

    def _engine(self, way: _Computes) -> ShardEngine:
        if way not in self._engines:
            device, dtype, backend = way
            settings, meta = self.population.settings, self.population.meta
            self._engines[way] = replaying_engine(
                settings, meta, self.population.store, device=device, dtype=dtype, backend=backend
            )
        return self._engines[way]


def _hyperparameters(wave: WaveManifest) -> tuple[TrainSettings, OptimizerSettings]:
    """The settings that the manifest names."""
    train, optimizer = wave.parameters["train"], wave.parameters["optimizer"]
    return TrainSettings(**train), OptimizerSettings(**optimizer)


def _how_far(steps: int, start: int) -> str:
    return f"{steps} update{'s' if steps > 1 else ''} after revision {start}"
