"""An ordered log on an object store: append at a number, read from a number.

One object per number. `append_at` never moves on by itself: who loses a number decides what that
means (an experience writer goes to the next one, an owner is fenced).
"""

from __future__ import annotations

from collections.abc import Iterator

from populace.storage.errors import ObjectNotFound
from populace.storage.objects.contract import ObjectStore


class Log:
    """Numbers start at 0 and have no gaps."""

    def __init__(self, store: ObjectStore, prefix: str, suffix: str) -> None:
        self.store = store
        self.prefix = prefix
        self.suffix = suffix

    def key(self, seq: int) -> str:
        return f"{self.prefix}/{seq:020d}{self.suffix}"

    def append_at(self, seq: int, body: bytes) -> None:
        """Create number `seq`. Raises `AlreadyExists` when it is taken, `OutcomeUnknown` when the
        store does not tell."""
        self.store.create(self.key(seq), body)

    def read(self, seq: int) -> bytes | None:
        try:
            return self.store.get(self.key(seq))
        except ObjectNotFound:
            return None

    def read_from(self, seq: int) -> Iterator[tuple[int, bytes]]:
        """Every record from `seq` on. A listing is never trusted to be complete: the end is the
        first number that is not there."""
        while (body := self.read(seq)) is not None:
            yield seq, body
            seq += 1

    def exists(self, seq: int) -> bool:
        try:
            self.store.head(self.key(seq))
        except ObjectNotFound:
            return False
        return True

    def next_after(self, seq: int) -> int:
        """The first free number at or after `seq`, by HEAD alone, in about 2 log2 of the distance
        to it."""
        step = 1
        while self.exists(seq + step - 1):
            step *= 2
        taken, free = seq + step // 2 - 1, seq + step - 1
        while free - taken > 1:
            middle = (taken + free) // 2
            if self.exists(middle):
                taken = middle
            else:
                free = middle
        return free
