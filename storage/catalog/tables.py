"""The catalog's columns, and what the codes in them mean.

    adapters   one row per adapter
    revisions  one row per revision, chained newest to oldest
    blobs      one row per part of a revision
    uses       segments of experience that a revision learned from
    notes      verdicts and settled records, chained newest to oldest

About 200 bytes for an adapter with one revision of one part; no Python object per user.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from populace.storage.catalog.attempts import Attempts
from populace.storage.catalog.columns import Index, Names, Rows, Table, halves_of
from populace.storage.log.records import Compaction

PARTS = ("weights", "moments", "evidence")
DECISIONS = ("settled", "promote", "keep", "reject", "rollback", "refused", "pin", "unpin")
"""What a note is; `settled` is no decision."""

FORGOTTEN, BARE = 1, 2
"""Flags of an adapter: its user is forgotten; only a tombstone, there never was an adapter."""
PROMOTED, PINNED, DROPPED, FADED = 1, 2, 4, 8
"""Flags of a revision. FADED: it stopped being the tip while it wasn't pinned, so its moments are
gone for good, also while their bytes are still in a pack: what an update starts from must depend on
the log alone."""


class CatalogTables:
    """The rows of all adapters of a population. `applying.py` fills them, `catalog.py` reads
    them."""

    def __init__(self) -> None:
        self.adapters = Table(
            high="u8", low="u8", partition="u2", spec="u4", seed="u8", tip="u4", serving="u4",
            next_revision="u4",
            consumed_segment="i4", consumed_row="i4", flags="u1", last_revision="i4",
            last_note="i4", changed="u4",
        )  # fmt: skip
        self.revisions = Table(
            adapter="u4", revision="u4", parent="u4", seq="u4", previous="i4", experts="u4",
            flags="u1",
            num_trained="u2", first_blob="u4", num_blobs="u1", first_use="u4", num_uses="u2",
        )  # fmt: skip
        self.blobs = Table(part="u1", pack="u4", offset="u8", size="u4", sha256=("u1", (32,)))
        self.uses = Table(segment="u4")
        self.notes = Table(adapter="u4", seq="u4", previous="i4", decision="u1", judged="u4")
        self.index = Index()
        self.specs, self.packs, self.experts = Names(), Names(), Names()
        self.num_settled: Counter[int] = Counter()
        """Per partition: events that ended without being trained on."""
        self.obeyed: set[tuple[str, str]] = set()
        """(pseudonym, tag) of commands that have their verdict."""
        self.compactions: dict[int, Compaction] = {}
        """Per partition: the last one."""
        self.owned: dict[int, bool] = {}
        """Per partition: whether the last claim is still unreleased."""
        self.attempts = Attempts()

    def rows_of(self, pseudonyms: Sequence[str]) -> Rows:
        """The adapters' rows; -1 for those that aren't there."""
        return self.index.find(*halves_of(pseudonyms))

    def row_of(self, pseudonym: str) -> int:
        """The row of an adapter that the log has created."""
        row = int(self.rows_of([pseudonym])[0])
        assert row >= 0, f"the log speaks of adapter {pseudonym!r} before creating it"
        return row

    def pseudonyms(self, rows: NDArray[Any]) -> list[str]:
        high, low = self.adapters["high"][rows], self.adapters["low"][rows]
        return [f"{a:016x}{b:016x}" for a, b in zip(high.tolist(), low.tolist(), strict=True)]

    def revision_rows(self, adapter: int) -> list[int]:
        """Newest first."""
        rows, row = [], int(self.adapters["last_revision"][adapter])
        while row >= 0:
            rows.append(row)
            row = int(self.revisions["previous"][row])
        return rows

    def revision_row(self, adapter: int, revision: int) -> int:
        row = int(self.adapters["last_revision"][adapter])
        while row >= 0 and self.revisions["revision"][row] != revision:
            row = int(self.revisions["previous"][row])
        assert row >= 0, f"revision {revision} was never committed"
        return row

    @property
    def size_bytes(self) -> int:
        """Memory of all columns and the index."""
        tables = (self.adapters, self.revisions, self.blobs, self.uses, self.notes)
        return sum(table.size_bytes for table in tables) + self.index.size_bytes
