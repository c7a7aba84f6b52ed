"""The object-store contract: one interface over `file://` and `memory://`.

`create` is the primitive that everything else rests on: of any number of racing creates of one key exactly one
succeeds, and the others raise `AlreadyExists`. A write whose fate the store does not tell raises
`OutcomeUnknown`; who needs to know finds out by reading.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlparse

import obstore
from obstore.exceptions import AlreadyExistsError, NotFoundError
from obstore.store import MemoryStore as _ObstoreMemory

from populace.storage.errors import AlreadyExists, InvalidInput, ObjectNotFound

_TEMPORARY = ".tmp-"


class ObjectStore(Protocol):
    """Keys are `/`-separated relative paths, bodies are bytes. Every call raises `ObjectNotFound` for a key
    that should be there and is not."""

    @property
    def url(self) -> str: ...

    def put(self, key: str, body: bytes) -> None:
        """Write or overwrite."""

    def create(self, key: str, body: bytes) -> None:
        """Write a new object; `AlreadyExists` if the key is taken. Never retried."""

    def get(self, key: str) -> bytes: ...

    def get_range(self, key: str, offset: int, size_bytes: int) -> bytes: ...

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        """Keys below the folder `prefix`, in order, those greater than `after`."""

    def delete(self, key: str) -> None:
        """Remove; a missing key is fine."""

    def head(self, key: str) -> int:
        """Size in bytes."""


class FileStore:
    """A local folder. Durable: a write returns after file and folder are synced, so that a power cut leaves
    either the whole object or none (obstore's local store never syncs)."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def url(self) -> str:
        return f"file://{self.root}"

    def put(self, key: str, body: bytes) -> None:
        self._write(key, body, os.replace)

    def create(self, key: str, body: bytes) -> None:
        self._write(key, body, os.link)

    def get(self, key: str) -> bytes:
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectNotFound(f"no object {key!r} in {self.url}") from None

    def get_range(self, key: str, offset: int, size_bytes: int) -> bytes:
        try:
            with open(self.root / key, "rb") as file:
                return os.pread(file.fileno(), size_bytes, offset)
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectNotFound(f"no object {key!r} in {self.url}") from None

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        found = []
        for folder, _, names in os.walk(self.root / prefix):
            relative = Path(folder).relative_to(self.root)
            found += [(relative / name).as_posix() for name in names if not name.startswith(_TEMPORARY)]
        return iter(sorted(key for key in found if key > after))

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def head(self, key: str) -> int:
        try:
            return (self.root / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectNotFound(f"no object {key!r} in {self.url}") from None

    def _write(self, key: str, body: bytes, publish: object) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            try:
                publish(temporary, path)  # type: ignore[operator]
            except FileExistsError:
                raise AlreadyExists(f"object {key!r} is already in {self.url}") from None
        finally:
            Path(temporary).unlink(missing_ok=True)
        # A new folder's own entry is only durable once the folder above it is synced.
        folder = path.parent
        while True:
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            if folder == self.root:
                return
            folder = folder.parent


class MemoryStore:
    """In this process only; for tests."""

    def __init__(self) -> None:
        self._store = _ObstoreMemory()

    @property
    def url(self) -> str:
        return "memory://"

    def put(self, key: str, body: bytes) -> None:
        obstore.put(self._store, key, body)

    def create(self, key: str, body: bytes) -> None:
        try:
            obstore.put(self._store, key, body, mode="create")
        except AlreadyExistsError:
            raise AlreadyExists(f"object {key!r} is already in {self.url}") from None

    def get(self, key: str) -> bytes:
        try:
            return bytes(obstore.get(self._store, key).bytes())
        except (NotFoundError, FileNotFoundError):
            raise ObjectNotFound(f"no object {key!r} in {self.url}") from None

    def get_range(self, key: str, offset: int, size_bytes: int) -> bytes:
        try:
            return bytes(obstore.get_range(self._store, key, start=offset, length=size_bytes))
        except (NotFoundError, FileNotFoundError):
            raise ObjectNotFound(f"no object {key!r} in {self.url}") from None

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        pages = obstore.list(self._store, prefix=prefix, offset=after or None)
        return iter(sorted(entry["path"] for page in pages for entry in page))

    def delete(self, key: str) -> None:
        obstore.delete(self._store, key)

    def head(self, key: str) -> int:
        try:
            return int(obstore.head(self._store, key)["size"])
        except (NotFoundError, FileNotFoundError):
            raise ObjectNotFound(f"no object {key!r} in {self.url}") from None


def open_store(url: str) -> ObjectStore:
    """The store at `file://PATH`, `memory://`, or a plain path."""
    parsed = urlparse(url)
    if parsed.scheme == "memory":
        return MemoryStore()
    if parsed.scheme == "file":
        if parsed.netloc:
            raise InvalidInput(f"store is {url!r}: 'file://' takes an absolute path; write file:///{parsed.netloc}…")
        return FileStore(Path(unquote(parsed.path)))
    if parsed.scheme or not url:
        raise InvalidInput(f"store is {url!r}; use file:///absolute/path, a plain path, or memory://")
    return FileStore(Path(url))
