"""The object-store contract: one interface over `file://`, `memory://` and `s3://`.

`create` is the primitive that everything else rests on: of any number of racing creates of one key
exactly one succeeds, and the others raise `AlreadyExists`. A write whose fate the store does not
tell raises `OutcomeUnknown`; who needs to know finds out by reading. A read that finds no answer
raises `StoreUnavailable`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class ObjectStore(Protocol):
    """Keys are `/`-separated relative paths, bodies are bytes. Every call raises `ObjectNotFound`
    for a key that should be there and is not."""

    @property
    def url(self) -> str:
        """What `open_store` makes this store from; holds no credentials."""

    def put(self, key: str, body: bytes) -> None:
        """Write or overwrite."""

    def create(self, key: str, body: bytes) -> None:
        """Write a new object; `AlreadyExists` if the key is taken. Never retried: a repeated create
        that had landed would tell the winner that it lost."""

    def get(self, key: str) -> bytes: ...

    def read_into(self, key: str, offset: int, into: memoryview) -> int:
        """Fill `into` with the object's bytes from `offset` on; returns how many there were."""

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        """Keys below the folder `prefix`, in order, those greater than `after`."""

    def folders(self) -> Sequence[str]:
        """The first parts of all keys that have more than one."""

    def delete(self, key: str) -> None:
        """Remove; a missing key is fine."""

    def head(self, key: str) -> int:
        """Size in bytes."""


def get_range(store: ObjectStore, key: str, offset: int, size_bytes: int) -> bytes:
    """Up to `size_bytes` bytes of an object from `offset` on; fewer where it ends."""
    buffer = bytearray(size_bytes)
    num_read = store.read_into(key, offset, memoryview(buffer))
    return bytes(buffer[:num_read])
