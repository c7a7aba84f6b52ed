"""A store that fails on purpose: dropped, lost, repeated and delayed calls, and a process that dies
in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from populace.storage.errors import AlreadyExists, OutcomeUnknown, PopulaceError, StoreUnavailable
from populace.storage.objects.contract import ObjectStore


class Crash(BaseException):
    """This process is dead from here on."""


@dataclass
class FaultyStore:
    """Passes everything on to `inner`, except for one call of the near future, which meets with
    `kind`."""

    inner: ObjectStore
    kind: str | None = None
    countdown: int = 0
    delayed: list[Callable[[], None]] = field(default_factory=list)
    url: str = "memory://"

    KINDS = ("dropped", "lost", "repeated", "delayed", "crash before", "crash after")
    """Not done; done without an answer; done twice; done later without an answer; dead before it or
    after it."""

    def plan(self, kind: str | None, countdown: int) -> None:
        """The call after `countdown` others fails."""
        self.kind, self.countdown = kind, countdown

    def deliver(self) -> None:
        """What was delayed arrives now."""
        calls, self.delayed = self.delayed, []
        for call in calls:
            call()

    def put(self, key: str, body: bytes) -> None:
        self._write(lambda: self.inner.put(key, body))

    def create(self, key: str, body: bytes) -> None:
        self._write(lambda: self.inner.create(key, body))

    def delete(self, key: str) -> None:
        self._write(lambda: self.inner.delete(key))

    def get(self, key: str) -> bytes:
        self._read()
        return self.inner.get(key)

    def read_into(self, key: str, offset: int, into: memoryview) -> int:
        self._read()
        return self.inner.read_into(key, offset, into)

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        self._read()
        return self.inner.list(prefix, after)

    def head(self, key: str) -> int:
        self._read()
        return self.inner.head(key)

    def _due(self) -> str | None:
        self.countdown -= 1
        if self.kind is None or self.countdown >= 0:
            return None
        kind, self.kind = self.kind, None
        return kind

    def _read(self) -> None:
        match self._due():
            case None | "repeated":
                return
            case "crash before" | "crash after":
                raise Crash
            case _:
                raise StoreUnavailable("503")

    def _write(self, effect: Callable[[], None]) -> None:
        kind = self._due()
        match kind:
            case "crash before":
                raise Crash
            case "dropped":
                raise OutcomeUnknown("503 before the effect")
            case "delayed":
                self.delayed.append(lambda: _quietly(effect))
                raise OutcomeUnknown("timeout; the request is still on its way")
        effect()
        match kind:
            case "crash after":
                raise Crash
            case "lost":
                raise OutcomeUnknown("503 after the effect")
            case "repeated":
                _quietly(effect)


def _quietly(effect: Callable[[], None]) -> None:
    try:
        effect()
    except (AlreadyExists, PopulaceError):
        return
