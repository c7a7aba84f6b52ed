"""The catalog: for every adapter its revisions, tip, serving and consumed position. Derived from
the revision logs alone; losing it costs a replay, a checkpoint makes that short.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from populace.storage.catalog.applying import apply_record
from populace.storage.catalog.states import AdapterState, Note, RevisionState
from populace.storage.catalog.tables import (
    BARE,
    DECISIONS,
    FADED,
    FORGOTTEN,
    PARTS,
    PINNED,
    PROMOTED,
    CatalogTables,
)
from populace.storage.errors import InvalidInput
from populace.storage.log.pack import BlobPlace
from populace.storage.log.records import BEFORE_ALL, Position, Record, RecordHeader


class Catalog(CatalogTables):
    """All adapters of a population. `apply` is the only way it changes; `checkpoint.py` saves and
    restores it."""

    def __init__(
        self, unmask_seed: Callable[[str, int], int] = lambda pseudonym, seed: seed
    ) -> None:
        """`unmask_seed`: the seed that a pseudonym's record hides."""
        super().__init__()
        self._unmask_seed = unmask_seed

    def apply(self, header: RecordHeader, record: Record) -> None:
        """Follow one record of a revision log."""
        apply_record(self, header, record)

    # Adapters.

    def __len__(self) -> int:
        return int(np.count_nonzero(self.adapters["flags"] & BARE == 0))

    def __iter__(self) -> Iterator[AdapterState]:
        """Every living adapter; for few of them, or for reports."""
        for row in np.flatnonzero(self.adapters["flags"] == 0):
            yield self.state(int(row))

    def __contains__(self, pseudonym: str) -> bool:
        """Whether there is an adapter, of a forgotten user too."""
        return bool(self.rows_of([pseudonym])[0] >= 0)

    def get(self, pseudonym: str) -> AdapterState | None:
        """None when there is no adapter, or its user is forgotten."""
        row = int(self.rows_of([pseudonym])[0])
        return None if row < 0 or self.adapters["flags"][row] else self.state(row)

    def require(self, pseudonym: str) -> AdapterState:
        found = self.get(pseudonym)
        if found is None:
            raise InvalidInput(f"no adapter {pseudonym!r}")
        return found

    def is_forgotten(self, pseudonym: str) -> bool:
        row = int(self.rows_of([pseudonym])[0])
        return row >= 0 and bool(self.adapters["flags"][row] & FORGOTTEN)

    def forgotten(self, partitions: Collection[int] | None = None) -> list[str]:
        """Everyone with a tombstone, in these partitions or in all."""
        has_tombstone = (self.adapters["flags"] & FORGOTTEN) > 0
        if partitions is not None:
            has_tombstone &= np.isin(self.adapters["partition"], list(partitions))
        return self.pseudonyms(np.flatnonzero(has_tombstone))

    def consumed_of(self, pseudonyms: Sequence[str]) -> list[Position]:
        """Consumed positions; `BEFORE_ALL` for those without an adapter."""
        rows, table = self.rows_of(pseudonyms), self.adapters
        segments, places = table["consumed_segment"], table["consumed_row"]
        return [
            BEFORE_ALL if row < 0 else (int(segments[row]), int(places[row]))
            for row in rows.tolist()
        ]

    def state(self, row: int) -> AdapterState:
        table = self.adapters
        pseudonym = f"{int(table['high'][row]):016x}{int(table['low'][row]):016x}"
        return AdapterState(
            pseudonym=pseudonym,
            partition=int(table["partition"][row]),
            spec=json.loads(self.specs.values[table["spec"][row]]),
            seed=self._unmask_seed(pseudonym, int(table["seed"][row])),
            tip=int(table["tip"][row]),
            serving=int(table["serving"][row]),
            next_revision=int(table["next_revision"][row]),
            consumed=(int(table["consumed_segment"][row]), int(table["consumed_row"][row])),
        )

    def unjudged(self) -> list[AdapterState]:
        """Adapters whose tip is not what serves."""
        table = self.adapters
        rows = np.flatnonzero((table["tip"] != table["serving"]) & (table["flags"] == 0))
        return [self.state(int(row)) for row in rows]

    def num_updated(self) -> int:
        """Adapters beyond revision 0."""
        return int(np.count_nonzero(self.adapters["next_revision"] > 1))

    def referenced_packs(self, partition: int) -> set[str]:
        """Packs that hold a blob of the partition's revisions."""
        revision = np.flatnonzero(
            self.adapters["partition"][self.revisions["adapter"]] == partition
        )
        owner = np.repeat(np.arange(self.revisions.size), self.revisions["num_blobs"])
        here = np.isin(owner, revision) & (self.blobs["size"] > 0)
        return {self.packs.values[number] for number in np.unique(self.blobs["pack"][here])}

    def count_decisions(self) -> Counter[str]:
        counts = np.bincount(self.notes["decision"], minlength=len(DECISIONS))
        return Counter({name: int(count) for name, count in zip(DECISIONS, counts, strict=True)})

    # One adapter's history.

    def revision_of(self, pseudonym: str, revision: int) -> RevisionState:
        """A committed revision above 0."""
        return self.revision_at(self.revision_row(self.row_of(pseudonym), revision))

    def revisions_of(self, pseudonym: str) -> list[RevisionState]:
        """All revisions above 0, oldest first."""
        return [self.revision_at(row) for row in self.revision_rows(self.row_of(pseudonym))[::-1]]

    def loadable(self, adapter: AdapterState, revision: int) -> int:
        """`revision` if its weights can be loaded; else `InvalidInput`."""
        if type(revision) is not int:
            raise InvalidInput(f"revision is {revision!r}; give a whole number")
        if not adapter.exists(revision):
            last = adapter.next_revision - 1
            raise InvalidInput(f"revision {revision} does not exist; this adapter has 0 to {last}")
        if revision != 0 and not self.revision_of(adapter.pseudonym, revision).is_kept:
            kept = [
                state.revision for state in self.revisions_of(adapter.pseudonym) if state.is_kept
            ]
            raise InvalidInput(
                f"revision {revision} was dropped by the retention rule; still there: {[0, *kept]}"
            )
        return revision

    def lineage_of(self, pseudonym: str, revision: int) -> list[int]:
        """`revision` and its ancestors down to 0, newest first."""
        rows = self.revision_rows(self.row_of(pseudonym))
        table = self.revisions
        numbers, parents_of = table["revision"][rows].tolist(), table["parent"][rows].tolist()
        parents, chain = dict(zip(numbers, parents_of, strict=True)), [revision]
        while chain[-1] != 0:
            chain.append(parents[chain[-1]])
        return chain

    def notes_of(self, pseudonym: str) -> list[Note]:
        """Verdicts and settled records, oldest first."""
        table = self.notes
        found, row = [], int(self.adapters["last_note"][self.row_of(pseudonym)])
        while row >= 0:
            decision = DECISIONS[table["decision"][row]]
            found.append(
                Note(
                    seq=int(table["seq"][row]), decision=decision, judged=int(table["judged"][row])
                )
            )
            row = int(table["previous"][row])
        return found[::-1]

    def revision_at(self, row: int) -> RevisionState:
        table, blobs = self.revisions, {}
        first = int(table["first_blob"][row])
        for blob in range(first, first + int(table["num_blobs"][row])):
            has_faded = (
                self.blobs["part"][blob] == PARTS.index("moments") and table["flags"][row] & FADED
            )
            if self.blobs["size"][blob] and not has_faded:
                blobs[PARTS[self.blobs["part"][blob]]] = self.place_of(blob)
        flags = int(table["flags"][row])
        return RevisionState(
            revision=int(table["revision"][row]),
            parent=int(table["parent"][row]),
            seq=int(table["seq"][row]),
            blobs=blobs,
            experts=self.experts.values[table["experts"][row]],
            num_trained=int(table["num_trained"][row]),
            is_promoted=bool(flags & PROMOTED),
            is_pinned=bool(flags & PINNED),
        )

    def place_of(self, blob: int) -> BlobPlace:
        return BlobPlace(
            pack=self.packs.values[self.blobs["pack"][blob]],
            offset=int(self.blobs["offset"][blob]),
            size_bytes=int(self.blobs["size"][blob]),
            sha256=self.blobs["sha256"][blob].tobytes().hex(),
        )
