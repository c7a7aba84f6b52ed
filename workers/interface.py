"""The `Workers` contract: what a controller asks of whatever computes."""

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
    """A shard group, or one engine in this process."""

    def describe(self) -> tuple[BaseDims, dict[str, str]]: ...
    def prefetch(self, refs: Sequence[AdapterRef]) -> None: ...
    def page_in(
        self, refs: Sequence[AdapterRef], with_moments: bool, keep: Sequence[AdapterKey] = ()
    ) -> Paging: ...
    def evict(self, keys: Sequence[AdapterKey]) -> None: ...
    def committed(self, pairs: Sequence[tuple[AdapterKey, AdapterKey]]) -> None: ...
    def forget(self, pseudonyms: Sequence[str]) -> None: ...
    def num_hot(self) -> int: ...
    def roll_out(self, requests: Sequence[RolloutRequest]) -> list[RolloutGroup]: ...
    def score_base(self, groups: Sequence[RolloutGroup]) -> list[tuple[Floats, ...]]: ...
    def train_wave(self, batch: WaveBatch) -> StepResult: ...
