"""Columns that grow, and an index over 128-bit keys: the catalog's memory. NumPy only, no object
per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


class Table:
    """Columns of equal length. `table["name"]` is a view of the rows that are there."""

    def __init__(self, **dtypes: Any) -> None:
        self._columns = {name: np.empty(0, dtype) for name, dtype in dtypes.items()}
        self.size = 0

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name][: self.size]

    def append(self, count: int, **values: Any) -> int:
        """Add `count` rows; every column gets an array of that length or one value for all. Returns
        the first new row."""
        first, self.size = self.size, self.size + count
        for name, column in self._columns.items():
            if self.size > len(column):
                grown = np.empty((self.size + self.size // 8 + 64, *column.shape[1:]), column.dtype)
                grown[:first] = column[:first]
                self._columns[name] = column = grown
            column[first : self.size] = values[name]
        return first

    @property
    def size_bytes(self) -> int:
        return sum(column.nbytes for column in self._columns.values())


class Index:
    """128-bit key -> row. A sorted array for most, a dictionary for the newest, merged now and
    then.

    Keys are hashes, so their upper bits say where in the array they are, give or take a few places:
    a look-up costs the same however many there are."""

    def __init__(self) -> None:
        self._high = np.empty(0, np.uint64)
        self._low = np.empty(0, np.uint64)
        self._row = np.empty(0, np.uint32)
        self._start = np.zeros(2, np.uint32)
        self._shift = np.uint64(63)
        self._recent: dict[tuple[int, int], int] = {}

    def add(self, high: NDArray[np.uint64], low: NDArray[np.uint64], row: Rows) -> None:
        """Keys must be new."""
        if len(high) + len(self._recent) <= max(4096, len(self._high) // 16):
            pairs = zip(high.tolist(), low.tolist(), strict=True)
            self._recent.update(zip(pairs, row.tolist(), strict=True))
            return
        recent = np.array(list(self._recent), np.uint64).reshape(-1, 2)
        recent_row = np.fromiter(self._recent.values(), np.uint32, len(self._recent))
        high, low = np.concatenate([high, recent[:, 0]]), np.concatenate([low, recent[:, 1]])
        row = np.concatenate([row, recent_row])
        order = np.lexsort((low, high))
        high, low, row = high[order], low[order], row[order]
        place = np.searchsorted(self._high, high)
        self._high = np.insert(self._high, place, high)
        self._low = np.insert(self._low, place, low)
        self._row = np.insert(self._row, place, row.astype(np.uint32))
        self._recent.clear()
        bits = max(1, len(self._high).bit_length())
        self._shift = np.uint64(64 - bits)
        bounds = np.arange(1 << bits, dtype=np.uint64) << self._shift
        self._start = np.searchsorted(self._high, bounds).astype(np.uint32)

    def find(self, high: NDArray[np.uint64], low: NDArray[np.uint64]) -> Rows:
        """The row of every key; -1 where there is none."""
        found = np.full(len(high), -1, np.int64)
        if len(self._high):
            place = self._start[high >> self._shift].astype(np.int64)
            open_ = np.flatnonzero(place < len(self._high))
            while len(open_):
                here, wanted = place[open_], high[open_]
                there = self._high[here]
                hit = (there == wanted) & (self._low[here] == low[open_])
                found[open_[hit]] = self._row[here[hit]]
                place[open_] += 1
                open_ = open_[(there <= wanted) & ~hit & (here + 1 < len(self._high))]
        if self._recent:
            for missing in np.flatnonzero(found < 0):
                found[missing] = self._recent.get((int(high[missing]), int(low[missing])), -1)
        return found

    @property
    def size_bytes(self) -> int:
        arrays = self._high.nbytes + self._low.nbytes + self._row.nbytes + self._start.nbytes
        return arrays + 200 * len(self._recent)


class Names:
    """Values that repeat, each kept once and known by a number."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._number: dict[Any, int] = {}

    def number(self, value: Any) -> int:
        if (found := self._number.get(value)) is None:
            found = self._number[value] = len(self.values)
            self.values.append(value)
        return found

    def numbers(self, values: Sequence[Any]) -> list[int]:
        return [self.number(value) for value in values]


def halves_of(names: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The upper and lower halves of names of 32 hexadecimal digits."""
    halves = np.frombuffer(bytes.fromhex("".join(names)), ">u8").reshape(-1, 2).astype(np.uint64)
    return halves[:, 0], halves[:, 1]


def ragged(first: NDArray[Any], count: NDArray[Any]) -> tuple[Rows, NDArray[np.int32]]:
    """Rows of runs `first[i] … first[i] + count[i] - 1` one after another, and where each run
    starts among them."""
    offsets = np.zeros(len(count) + 1, np.int64)
    np.cumsum(count, out=offsets[1:])
    rows = np.repeat(first.astype(np.int64) - offsets[:-1], count) + np.arange(offsets[-1])
    return rows, offsets.astype(np.int32)
