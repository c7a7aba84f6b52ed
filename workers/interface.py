"""The `Workers` contract: what a controller asks of whatever computes. `ShardEngine` is one in this
process, `ShardGroup` one on Ray actors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from populace.workers.batch import (
    AdapterKey,
    AdapterRef,
    Floats,
    Paging,
    RolloutGroup,
    RolloutRequest,
    StepResult,
    WaveBatch,
)
from populace.workers.shapes import BaseDims


class Workers(Protocol):
    """Calls come one after another. An adapter that is rolled out or trained must be hot: `page_in`
    comes first. After `train_wave` a slot is dirty, until `committed` names the revision that its
    content became or `evict` drops it."""

    def describe(self) -> tuple[BaseDims, dict[str, str]]:
        """The base's shapes, and the numerics fingerprint that manifests carry: device, dtype,
        versions, and whether bits are promised. Asked again after the workers were replaced."""

    def prefetch(self, refs: Sequence[AdapterRef]) -> None:
        """Start loading adapters that a later `page_in` will ask for, and return at once. Replaces
        the wish of the call before."""

    def page_in(
        self, refs: Sequence[AdapterRef], with_moments: bool, keep: Sequence[AdapterKey] = ()
    ) -> Paging:
        """Make all of `refs` hot together, evicting what was used least recently but none of
        `keep`. `with_moments`: they are to be trained. `InvalidInput` if there are more than slots,
        `Damaged` for bytes that are not the committed ones; then nothing half-filled stays."""

    def evict(self, keys: Sequence[AdapterKey]) -> None:
        """Drop slots whose content may be no revision. Keys that aren't hot are passed over."""

    def committed(self, pairs: Sequence[tuple[AdapterKey, AdapterKey]]) -> None:
        """(old, new) pairs: what was trained in the slot of `old` is now revision `new`."""

    def forget(self, pseudonyms: Sequence[str]) -> None:
        """Drop everything of erased users from every tier, their keys included."""

    def roll_out(self, requests: Sequence[RolloutRequest]) -> list[RolloutGroup]:
        """One group of samples per request, in order. What a user gets does not depend on the other
        requests; the noise follows from adapter seed, revision, event and sample number."""

    def score_base(self, groups: Sequence[RolloutGroup]) -> list[tuple[Floats, ...]]:
        """For every group its samples' log-probabilities under the base alone, [C] each."""

    def train_wave(self, batch: WaveBatch) -> StepResult:
        """One fused step; updates in the order of the batch. An adapter without signal, or with a
        gradient that is not finite, keeps its slot bit for bit."""
