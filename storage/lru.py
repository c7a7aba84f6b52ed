"""What goes when a cache is full: the least recently used. Policy only; the content is
elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Lru(Generic[Key]):
    """Keys with sizes, least recently used first, up to `capacity` in the same unit."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.size = capacity, 0.0
        self._sizes: OrderedDict[Key, float] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._sizes)

    def touch(self, key: Key) -> None:
        """Mark `key` as most recently used."""
        self._sizes.move_to_end(key)

    def put(self, key: Key, size: float, keep: Collection[Key] = ()) -> list[Key]:
        """Add `key`; returns what had to go for it, none of `keep`. A key that doesn't fit beside
        those stays out, and is returned itself."""
        self.drop(key)
        going: list[Key] = []
        room = self.capacity - self.size
        for candidate, its_size in self._sizes.items():
            if room >= size:
                break
            if candidate not in keep:
                going.append(candidate)
                room += its_size
        if room < size:
            return [key]
        for candidate in going:
            self.drop(candidate)
        self._sizes[key] = size
        self.size += size
        return going

    def shrink(self, keep: Collection[Key] = ()) -> list[Key]:
        """Drop what has to go, none of `keep`, for a capacity that became smaller."""
        going: list[Key] = []
        for key, size in list(self._sizes.items()):
            if self.size <= self.capacity:
                break
            if key not in keep:
                going.append(key)
                self._sizes.pop(key)
                self.size -= size
        return going

    def drop(self, key: Key) -> None:
        """Remove `key`; no error if absent."""
        self.size -= self._sizes.pop(key, 0.0)
