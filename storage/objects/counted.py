"""A store that counts what is asked of it, for metrics."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from populace.storage.errors import AlreadyExists, ObjectNotFound, OutcomeUnknown, StoreUnavailable
from populace.storage.objects.contract import ObjectStore

Calls = Mapping[tuple[str, str], tuple[int, float]]
"""(operation, outcome) -> number of calls, seconds spent in them."""

OUTCOMES: dict[type[Exception], str] = {
    AlreadyExists: "exists",
    ObjectNotFound: "absent",
    OutcomeUnknown: "unknown",
    StoreUnavailable: "unavailable",
}
"""What isn't `ok`; everything else is `refused`. Only `unknown`, `unavailable` and `refused` are
failures."""


class CountedStore:
    """An `ObjectStore` around another one. Thread-safe."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._calls: dict[tuple[str, str], tuple[int, float]] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self._store.url

    def take_calls(self) -> Calls:
        """What was asked since this was called last."""
        with self._lock:
            calls, self._calls = self._calls, {}
        return calls

    def put(self, key: str, body: bytes) -> None:
        with self._counting("put"):
            self._store.put(key, body)

    def create(self, key: str, body: bytes) -> None:
        with self._counting("create"):
            self._store.create(key, body)

    def get(self, key: str) -> bytes:
        with self._counting("get"):
            return self._store.get(key)

    def read_into(self, key: str, offset: int, into: memoryview) -> int:
        with self._counting("get_range"):
            return self._store.read_into(key, offset, into)

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        with self._counting("list"):
            return self._store.list(prefix, after)

    def folders(self) -> Sequence[str]:
        with self._counting("list"):
            return self._store.folders()

    def delete(self, key: str) -> None:
        with self._counting("delete"):
            self._store.delete(key)

    def head(self, key: str) -> int:
        with self._counting("head"):
            return self._store.head(key)

    @contextlib.contextmanager
    def _counting(self, operation: str) -> Iterator[None]:
        started, outcome = time.monotonic(), "ok"
        try:
            yield
        except Exception as error:
            outcome = OUTCOMES.get(type(error), "refused")
            raise
        finally:
            with self._lock:
                count, seconds = self._calls.get((operation, outcome), (0, 0.0))
                self._calls[operation, outcome] = (count + 1, seconds + time.monotonic() - started)


def add_calls(parts: Sequence[Calls]) -> Calls:
    """The sum of what several counted."""
    total: dict[tuple[str, str], tuple[int, float]] = {}
    for part in parts:
        for what, (count, seconds) in part.items():
            before = total.get(what, (0, 0.0))
            total[what] = (before[0] + count, before[1] + seconds)
    return total
