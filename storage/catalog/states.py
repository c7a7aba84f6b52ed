"""One adapter, one revision, one note, as the catalog describes them when asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from populace.storage.errors import InvalidInput
from populace.storage.log.pack import BlobPlace
from populace.storage.log.records import Position

if TYPE_CHECKING:
    from populace.storage.catalog.catalog import Catalog


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionState:
    """One revision and where its bytes are."""

    revision: int
    parent: int
    seq: int
    """Number of the record that committed it."""
    blobs: dict[str, BlobPlace]
    """What is still there of weights, moments and evidence."""
    experts: tuple[int, ...]
    """Experts whose tensors the blobs hold; the others are as initialised."""
    num_trained: int
    is_promoted: bool
    is_pinned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A verdict about a revision, or events settled without one (`judged` 0)."""

    seq: int
    decision: str
    judged: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterState:
    """One adapter as its log described it when this was taken."""

    catalog: Catalog
    row: int
    pseudonym: str
    partition: int
    spec: dict[str, Any]
    seed: int
    tip: int
    serving: int
    next_revision: int
    consumed: Position

    def lineage(self, revision: int) -> list[int]:
        """`revision` and its ancestors down to 0, newest first."""
        parents = self.catalog.parents_of(self.row)
        chain = [revision]
        while chain[-1] != 0:
            chain.append(parents[chain[-1]])
        return chain

    def exists(self, revision: int) -> bool:
        """Whether `revision` was ever committed; its bytes may have been dropped since."""
        return 0 <= revision < self.next_revision

    def revision(self, revision: int) -> RevisionState:
        """A committed revision above 0."""
        return self.catalog.revision_state(self.row, revision)

    def revisions(self) -> list[RevisionState]:
        """All of them, oldest first."""
        return [self.catalog.revision_at(row) for row in self.catalog.revision_rows(self.row)[::-1]]

    def notes(self) -> list[Note]:
        """Verdicts and settled records, oldest first."""
        return self.catalog.notes_of(self.row)

    def require(self, revision: int) -> int:
        """`revision` if its weights can be loaded; else `InvalidInput`."""
        if type(revision) is not int:
            raise InvalidInput(f"revision is {revision!r}; give a whole number")
        if not self.exists(revision):
            raise InvalidInput(f"revision {revision} does not exist; this adapter has 0 to {self.next_revision - 1}")
        if revision != 0 and "weights" not in self.revision(revision).blobs:
            kept = [state.revision for state in self.revisions() if "weights" in state.blobs]
            raise InvalidInput(f"revision {revision} was dropped by the retention rule; still there: {[0, *kept]}")
        return revision
