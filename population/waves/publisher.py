"""A trained wave on its way into the store: sealed, packed, written and signed behind the next
wave's back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from populace.population.ledger.ledger import Ledger
from populace.population.waves.wave import MemberOutcome, Publication, Wave
from populace.storage.catalog.states import AdapterState, RevisionState
from populace.storage.log.loading import blob_context
from populace.storage.log.owner import Owner, RevisionDraft
from populace.storage.log.records import Batch, Record, RecordHeader
from populace.workers.batch import AdapterKey, AdapterUpdate, StepResult
from populace.workers.evidence import encode_evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """One member's new revision, and what it starts from."""

    outcome: MemberOutcome
    update: AdapterUpdate
    adapter: AdapterState
    parent: RevisionState | None


class Publisher:
    """Writes waves one after another, in a thread of its own. Nothing here touches the catalog."""

    def __init__(self, ledger: Ledger, settings: Mapping[str, Any], template_digest: str) -> None:
        self._ledger, self._thread = (
            ledger,
            ThreadPoolExecutor(1, thread_name_prefix="populace-publish"),
        )
        self._parameters = {
            "algorithm": "grpo+reinforce+sft",
            **{part: settings[part] for part in ("train", "optimizer", "rollout")},
            "seed": ledger.meta.seed,
        }
        self._materials = {"base": ledger.meta.base_digest, "chat_template": template_digest}

    def start(
        self,
        wave: Wave,
        adapters: Mapping[str, AdapterState],
        outcomes: Sequence[MemberOutcome],
        result: StepResult,
        numerics: Mapping[str, str],
    ) -> Publication:
        """Partition by partition: one atomic record for the new revisions, one for users without
        any."""
        updates: dict[int, list[_Update]] = {}
        others: dict[int, list[Record]] = {}
        renamed = []
        for outcome, update in zip(outcomes, result.updates, strict=True):
            member, adapter = outcome.member, adapters[outcome.member.pseudonym]
            others.setdefault(member.partition, [])
            if update.status == "updated":
                parent = (
                    self._ledger.catalog.revision_of(adapter.pseudonym, adapter.tip)
                    if adapter.tip
                    else None
                )
                item = _Update(outcome=outcome, update=update, adapter=adapter, parent=parent)
                updates.setdefault(member.partition, []).append(item)
                renamed.append(
                    (
                        AdapterKey(adapter.pseudonym, adapter.tip),
                        AdapterKey(adapter.pseudonym, adapter.next_revision),
                    )
                )
            elif (record := outcome.without_update(update.status)) is not None:
                others[member.partition].append(record)
            if outcome.failed is not None:
                others[member.partition].append(outcome.failed)
        owners = {partition: self._ledger.owner(partition) for partition in others}
        records: list[tuple[RecordHeader, Record]] = []
        written = self._thread.submit(
            self._write,
            wave,
            owners,
            updates,
            others,
            {**numerics, "populace": version("populace")},
            records,
        )
        return Publication(
            written=written, records=records, renamed=renamed, pseudonyms=tuple(adapters)
        )

    def close(self) -> None:
        self._thread.shutdown()

    def _write(
        self,
        wave: Wave,
        owners: Mapping[int, Owner],
        updates: Mapping[int, list[_Update]],
        others: Mapping[int, list[Record]],
        numerics: Mapping[str, str],
        records: list[tuple[RecordHeader, Record]],
    ) -> None:
        for partition, owner in owners.items():
            drafts = [self._draft(item) for item in updates.get(partition, [])]
            if drafts:
                records.append(
                    owner.commit_wave(
                        wave.wave_id,
                        drafts,
                        parameters=self._parameters,
                        materials=self._materials,
                        numerics=numerics,
                    )
                )
            # Failures last: a user's new revision clears those of its earlier events.
            if own := others[partition]:
                record = own[0] if len(own) == 1 else Batch(records=own)
                records.append((owner.append(record), record))

    def _draft(self, item: _Update) -> RevisionDraft:
        pseudonym, revision, keys = (
            item.adapter.pseudonym,
            item.adapter.next_revision,
            self._ledger.keys,
        )
        parent = {} if item.parent is None else item.parent.blobs
        parts = {
            "weights": item.update.weights,
            "moments": item.update.moments,
            "evidence": encode_evidence(item.outcome.groups),
        }
        consumed = item.outcome.consumed
        assert consumed is not None
        return RevisionDraft(
            pseudonym=pseudonym,
            revision=revision,
            parent=item.adapter.tip,
            parent_sha256=parent["weights"].sha256 if parent else None,
            parent_moments_sha256=parent["moments"].sha256 if "moments" in parent else None,
            blobs={
                part: keys.seal(pseudonym, blob, blob_context(part, revision))
                for part, blob in parts.items()
            },
            experts=list(item.update.experts),
            trained=list(item.outcome.trained),
            settled=list(item.outcome.settled),
            consumed=consumed,
            metrics=item.update.metrics,
        )
