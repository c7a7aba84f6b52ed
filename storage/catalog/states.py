"""One adapter, one revision, one note, as the catalog describes them when asked. Plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from populace.storage.log.pack import BlobPlace
from populace.storage.log.records import Position


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionState:
    """One committed revision and where its bytes are."""

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

    @property
    def is_kept(self) -> bool:
        """Whether its weights are still in the store; a retention rule drops old ones."""
        return "weights" in self.blobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A verdict about a revision, or events settled without one (`judged` 0)."""

    seq: int
    decision: str
    judged: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterState:
    """One adapter as its log described it when this was taken. `Catalog.revisions`, `lineage` and
    `notes` tell its history.

    Example: `AdapterState(pseudonym="3f…", partition=2, spec={"rank": 8, …}, seed=71, tip=4,
    serving=3, next_revision=5, consumed=(12, 0))`: four revisions were committed, the third
    serves."""

    pseudonym: str
    partition: int
    spec: dict[str, Any]
    seed: int
    tip: int
    serving: int
    next_revision: int
    consumed: Position

    def exists(self, revision: int) -> bool:
        """Whether `revision` was ever committed; its bytes may have been dropped since."""
        return 0 <= revision < self.next_revision
