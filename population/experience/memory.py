"""Which event ids came before: how a repetition is told from a new event."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from populace.storage.catalog.columns import Index, Table, halves_of

HORIZON = 1 << 20
"""Event ids of a partition that are remembered at least: repetitions fall out as long as no more
events came between. Integer ids need no memory: they fall out for ever."""


class EventMemory:
    """Which event ids came lately, with what content; and the highest integer id of every user who
    uses integers.

    Two generations of `horizon` ids: when one is full, the older one goes."""

    def __init__(self, horizon: int = HORIZON) -> None:
        self.horizon = horizon
        self._generations = [_Generation(), _Generation()]
        self._highest: dict[tuple[int, int], int] = {}
        self.has_forgotten = False
        """Whether ids ever fell out of the memory."""

    def find(self, tags: Sequence[str]) -> NDArray[np.uint64]:
        """For each tag the first half of the digest it came with; 0 for those that aren't
        remembered."""
        high, low = halves_of(tags)
        found = np.zeros(len(high), np.uint64)
        for generation in self._generations:
            rows = generation.index.find(high, low)
            there = rows >= 0
            found[there] = generation.table["digest"][rows[there]]
        return found

    def add(self, tags: Sequence[str], digests: Sequence[int]) -> None:
        """Remember new ids."""
        high, low = halves_of(tags)
        self._generations[0].add(high, low, np.array(digests, np.uint64))
        if self._generations[0].table.size >= self.horizon:
            self.has_forgotten |= self._generations[1].table.size > 0
            self._generations = [_Generation(), self._generations[0]]

    def highest(self, pseudonym: str) -> int:
        return self._highest.get(_key(pseudonym), -1)

    def raise_highest(self, pseudonym: str, number: int) -> None:
        self._highest[_key(pseudonym)] = number

    def dump(self) -> list[pa.Table]:
        tables = []
        for generation in self._generations:
            columns = {name: pa.array(generation.table[name]) for name in ("high", "low", "digest")}
            metadata = {"has_forgotten": str(int(self.has_forgotten))}
            tables.append(pa.table(columns).replace_schema_metadata(metadata))
        keys = np.array(list(self._highest), np.uint64).reshape(-1, 2)
        highest = pa.array(list(self._highest.values()), pa.int64())
        return [
            *tables,
            pa.table(
                {"high": pa.array(keys[:, 0]), "low": pa.array(keys[:, 1]), "highest": highest}
            ),
        ]

    @staticmethod
    def load(tables: Sequence[pa.Table], horizon: int = HORIZON) -> EventMemory:
        memory = EventMemory(horizon)
        for generation, table in zip(memory._generations, tables[:2], strict=True):
            generation.add(*(table.column(name).to_numpy() for name in ("high", "low", "digest")))
        memory.has_forgotten = tables[0].schema.metadata[b"has_forgotten"] == b"1"
        keys = zip(*(tables[2].column(name).to_pylist() for name in ("high", "low")), strict=True)
        memory._highest = dict(zip(keys, tables[2].column("highest").to_pylist(), strict=True))
        return memory


class _Generation:
    def __init__(self) -> None:
        self.index, self.table = Index(), Table(high="u8", low="u8", digest="u8")

    def add(
        self, high: NDArray[np.uint64], low: NDArray[np.uint64], digest: NDArray[np.uint64]
    ) -> None:
        if len(high):
            first = self.table.append(len(high), high=high, low=low, digest=digest)
            self.index.add(high, low, np.arange(first, first + len(high)))


def _key(pseudonym: str) -> tuple[int, int]:
    return int(pseudonym[:16], 16), int(pseudonym[16:], 16)
