"""A trained wave on its way into the store: sealed, packed, written and signed behind the next
wave's back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from populace.population.ledger.ledger import Ledger
from populace.population.waves.wave import TrainedMember, TrainedWave
from populace.storage.catalog.states import RevisionState
from populace.storage.log.loading import blob_context
from populace.storage.log.owner import NewRevision, Owner
from populace.storage.log.records import (
    Record,
    RecordHeader,
    RevisionEntry,
    Settled,
    batched,
)
from populace.workers.batch import AdapterKey
from populace.workers.evidence import encode_evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """The part of a wave that is in the log now, whatever became of the rest."""

    records: tuple[tuple[RecordHeader, Record], ...]
    error: BaseException | None
    """Why there isn't more."""


class Publication:
    """A wave that is being written."""

    def __init__(self, trained: TrainedWave, written: Future[Landed]) -> None:
        self.trained, self._written = trained, written
        self._is_collected = False

    @property
    def renamed(self) -> list[tuple[AdapterKey, AdapterKey]]:
        """Slots whose content is another revision once everything is written."""
        return [member.renamed for member in self.trained.members if member.is_updated]

    @property
    def pseudonyms(self) -> list[str]:
        return [member.planned.member.pseudonym for member in self.trained.members]

    def collect(self) -> Landed | None:
        """Wait for the writer. What landed is handed out once, to be applied once; None
        afterwards."""
        if self._is_collected:
            return None
        landed = self._written.result()
        self._is_collected = True
        return landed


class Publisher:
    """Writes waves one after another, in a thread of its own. Nothing here touches the catalog."""

    def __init__(self, ledger: Ledger, settings: Mapping[str, Any], template_digest: str) -> None:
        self._ledger = ledger
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="populace-publish")
        self._parameters = {
            "algorithm": "grpo+reinforce+sft",
            **{part: settings[part] for part in ("train", "optimizer", "rollout")},
            "seed": ledger.meta.seed,
        }
        self._materials = {"base": ledger.meta.base_digest, "chat_template": template_digest}

    def start(self, trained: TrainedWave, numerics: Mapping[str, str]) -> Publication:
        """Partition by partition: one atomic record for the new revisions, one for users without
        any."""
        by_partition: dict[int, list[_Row]] = {}
        for member in trained.members:
            row = _Row(member=member, parent=self._parent(member))
            by_partition.setdefault(member.planned.member.partition, []).append(row)
        owners = {partition: self._ledger.owners[partition] for partition in by_partition}
        told = {**numerics, "populace": version("populace")}
        written = self._thread.submit(self._write, trained.wave_id, by_partition, owners, told)
        return Publication(trained, written)

    def close(self) -> None:
        """Wait for what is being written, and end the thread."""
        self._thread.shutdown()

    def _parent(self, member: TrainedMember) -> RevisionState | None:
        """The committed revision that an update started from; None: revision 0, or no update."""
        adapter = member.planned.adapter
        if not member.is_updated or not adapter.tip:
            return None
        return self._ledger.catalog.revision_of(adapter.pseudonym, adapter.tip)

    # In the publisher's thread.

    def _write(
        self,
        wave_id: str,
        by_partition: Mapping[int, list[_Row]],
        owners: Mapping[int, Owner],
        numerics: Mapping[str, str],
    ) -> Landed:
        landed: list[tuple[RecordHeader, Record]] = []
        try:
            for partition, rows in by_partition.items():
                updated = [row for row in rows if row.member.is_updated]
                if updated:
                    commit = owners[partition].commit_wave(
                        wave_id,
                        [self._new_revision(row) for row in updated],
                        parameters=self._parameters,
                        materials=self._materials,
                        numerics=numerics,
                    )
                    landed.append(commit)
                # Failures last: a user's new revision clears those of its earlier events.
                if others := self._others([row.member for row in rows]):
                    record = batched(others)
                    landed.append((owners[partition].append(record), record))
        except BaseException as error:
            return Landed(records=tuple(landed), error=error)
        return Landed(records=tuple(landed), error=None)

    def _others(self, members: Sequence[TrainedMember]) -> list[Record]:
        """The records of events that end without a revision, or failed."""
        records: list[Record] = []
        for member in members:
            if not member.is_updated and (record := self._settled(member)) is not None:
                records.append(record)
            if member.outcome.failed is not None:
                records.append(member.outcome.failed)
        return records

    def _settled(self, member: TrainedMember) -> Settled | None:
        """The record of a user whose events end without a revision; None if none does."""
        outcome = member.outcome
        if outcome.consumed is None:
            return None
        return Settled(
            pseudonym=outcome.planned.member.pseudonym,
            events=[*map(self._ledger.seals.settled, outcome.settled), *member.unlearned],
            consumed=outcome.consumed,
        )

    def _new_revision(self, row: _Row) -> NewRevision:
        outcome, update, adapter = row.member.outcome, row.member.update, row.member.planned.adapter
        pseudonym, revision = adapter.pseudonym, adapter.next_revision
        parent = {} if row.parent is None else row.parent.blobs
        parts = {
            "weights": update.weights,
            "moments": update.moments,
            "evidence": encode_evidence(outcome.groups),
        }
        assert outcome.consumed is not None
        entry = RevisionEntry(
            pseudonym=pseudonym,
            revision=revision,
            parent=adapter.tip,
            parent_sha256=parent["weights"].sha256 if parent else None,
            parent_moments_sha256=parent["moments"].sha256 if "moments" in parent else None,
            blobs={},
            experts=list(update.experts),
            trained=list(outcome.trained),
            settled=list(map(self._ledger.seals.settled, outcome.settled)),
            consumed=outcome.consumed,
            metrics=update.metrics,
        )
        seal = self._ledger.keys.seal
        return NewRevision(
            entry=entry,
            blobs={
                part: seal(pseudonym, blob, blob_context(part, revision))
                for part, blob in parts.items()
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A trained member, and the committed revision that it started from."""

    member: TrainedMember
    parent: RevisionState | None
