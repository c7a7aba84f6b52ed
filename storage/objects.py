"""The object-store contract: one interface over `file://`, `memory://` and `s3://`.

`create` is the primitive that everything else rests on: of any number of racing creates of one key exactly one
succeeds, and the others raise `AlreadyExists`. A write whose fate the store does not tell raises
`OutcomeUnknown`; who needs to know finds out by reading. A read that finds no answer raises `StoreUnavailable`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlparse

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import MemoryStore as _ObstoreMemory

from populace.storage.errors import AlreadyExists, InvalidInput, ObjectNotFound, OutcomeUnknown, StoreUnavailable

_TEMPORARY = ".tmp-"


class ObjectStore(Protocol):
    """Keys are `/`-separated relative paths, bodies are bytes. Every call raises `ObjectNotFound` for a key
    that should be there and is not."""

    @property
    def url(self) -> str:
        """What `open_store` makes this store from; holds no credentials."""

    def put(self, key: str, body: bytes) -> None:
        """Write or overwrite."""

    def create(self, key: str, body: bytes) -> None:
        """Write a new object; `AlreadyExists` if the key is taken. Never retried: a repeated create that had
        landed would tell the winner that it lost."""

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


class FileStore:
    """A local folder. Durable: a write returns after file and folder are synced, so that a power cut leaves
    either the whole object or none (obstore's local store never syncs)."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._durable_folders: set[Path] = set()

    @property
    def url(self) -> str:
        return f"file://{quote(str(self.root))}"

    def put(self, key: str, body: bytes) -> None:
        path = self.root / key
        was_there = path.exists()
        self._write(key, body, os.replace)
        if was_there:  # what writers that died left of earlier bodies must not outlive them
            for left in path.parent.glob(f"{_TEMPORARY}{path.name}-*"):
                left.unlink(missing_ok=True)

    def create(self, key: str, body: bytes) -> None:
        self._write(key, body, os.link)

    def get(self, key: str) -> bytes:
        with self._reading(key):
            return (self.root / key).read_bytes()

    def read_into(self, key: str, offset: int, into: memoryview) -> int:
        with self._reading(key), open(self.root / key, "rb", buffering=0) as file:
            num_read = 0
            while num_read < len(into):  # one call reads at most 2 GiB
                step = os.preadv(file.fileno(), [into[num_read:]], offset + num_read)
                if step == 0:
                    break
                num_read += step
            return num_read

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        found = []
        for folder, _, names in os.walk(self.root / prefix):
            relative = Path(folder).relative_to(self.root).as_posix()
            found += [f"{relative}/{name}" for name in names if not name.startswith(_TEMPORARY)]
        return iter(sorted(key for key in found if key > after))

    def folders(self) -> Sequence[str]:
        return sorted(path.name for path in self.root.iterdir() if path.is_dir()) if self.root.is_dir() else []

    def delete(self, key: str) -> None:
        path = self.root / key
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_folder(path.parent)

    def head(self, key: str) -> int:
        with self._reading(key):
            return (self.root / key).stat().st_size

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectNotFound(f"no object {key!r} in {self.url}") from None
        except OSError as error:
            raise StoreUnavailable(f"object {key!r} in {self.url} can't be read: {error}") from error

    def _write(self, key: str, body: bytes, publish: Callable[[str, Path], None]) -> None:
        path = self.root / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f"{_TEMPORARY}{path.name}-", dir=path.parent)
        except OSError as error:
            raise StoreUnavailable(f"object {key!r} can't be written to {self.url}: {error}") from error
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
        except FileExistsError:
            raise AlreadyExists(f"object {key!r} is already in {self.url}") from None
        except OSError as error:  # a full disk, a lost mount; the object is not there
            raise StoreUnavailable(f"object {key!r} can't be written to {self.url}: {error}") from error
        finally:
            Path(temporary).unlink(missing_ok=True)
        try:
            self._sync(path.parent)
        except OSError as error:
            raise OutcomeUnknown(f"object {key!r} in {self.url} may not be durable: {error}") from error

    def _sync(self, folder: Path) -> None:
        """A new folder's own entry is only durable once the folder above it is synced, up to the root."""
        sync_folder(folder)
        if folder not in self._durable_folders:
            for above in folder.parents:
                if above == self.root.parent:
                    break
                sync_folder(above)
            self._durable_folders.add(folder)


class ObstoreStore:
    """Any store of obstore's. `creating` is the same store with retries off."""

    def __init__(self, url: str, store: Any, creating: Any) -> None:
        self.url = url
        self._store, self._creating = store, creating

    def put(self, key: str, body: bytes) -> None:
        with self._writing(key):
            obstore.put(self._store, key, body)

    def create(self, key: str, body: bytes) -> None:
        with self._writing(key):
            obstore.put(self._creating, key, body, mode="create", use_multipart=False)

    def get(self, key: str) -> bytes:
        with self._reading(key):
            return bytes(obstore.get(self._store, key).bytes())

    def read_into(self, key: str, offset: int, into: memoryview) -> int:
        try:
            with self._reading(key):
                body = memoryview(obstore.get_range(self._store, key, start=offset, length=len(into)))
        except StoreUnavailable:
            if self.head(key) > offset:
                raise
            return 0  # HTTP has no word for "nothing there": a range past the end is an error
        num_read = min(len(body), len(into))
        into[:num_read] = body[:num_read]
        return num_read

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        with self._reading(prefix):
            pages = obstore.list(self._store, prefix=prefix, offset=after or None, chunk_size=1000)
            found = [entry["path"] for page in pages for entry in page]
        return iter(sorted(key for key in found if key > after))

    def folders(self) -> Sequence[str]:
        with self._reading(""):
            return sorted(obstore.list_with_delimiter(self._store)["common_prefixes"])

    def delete(self, key: str) -> None:
        try:
            with self._writing(key):
                obstore.delete(self._store, key)
        except ObjectNotFound:
            return

    def head(self, key: str) -> int:
        with self._reading(key):
            return int(obstore.head(self._store, key)["size"])

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (NotFoundError, FileNotFoundError):
            raise ObjectNotFound(f"no object {key!r} in {self.url}") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise InvalidInput(_refused(self.url, key)) from error
        except BaseError as error:
            if any(word in str(error) for word in ("AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId")):
                raise InvalidInput(_refused(self.url, key)) from error  # listings have no error of their own for it
            raise StoreUnavailable(f"object {key!r} in {self.url} can't be read: {_short(error)}") from error

    @contextlib.contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            yield
        except (AlreadyExistsError, PreconditionError):
            raise AlreadyExists(f"object {key!r} is already in {self.url}") from None
        except (NotFoundError, FileNotFoundError):
            raise ObjectNotFound(f"no bucket or object for {key!r} in {self.url}") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise InvalidInput(_refused(self.url, key)) from error
        except BaseError as error:
            raise OutcomeUnknown(f"{self.url} did not say whether {key!r} was written: {_short(error)}") from error


class MemoryStore(ObstoreStore):
    """In this process only; for tests."""

    def __init__(self) -> None:
        memory = _ObstoreMemory()
        super().__init__("memory://", memory, memory)


def get_range(store: ObjectStore, key: str, offset: int, size_bytes: int) -> bytes:
    """Up to `size_bytes` bytes of an object from `offset` on; fewer where it ends."""
    buffer = bytearray(size_bytes)
    num_read = store.read_into(key, offset, memoryview(buffer))
    return bytes(buffer[:num_read])


def open_store(url: str) -> ObjectStore:
    """The store at `file://PATH`, a plain path, `memory://`, or `s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME]`."""
    parsed = urlparse(url)
    if parsed.scheme == "memory":
        return MemoryStore()
    if parsed.scheme == "s3":
        from populace.storage.s3 import open_s3  # the minio SDK is slow to import

        return open_s3(url)
    if parsed.scheme == "file":
        if parsed.netloc:
            raise InvalidInput(f"store is {url!r}: 'file://' takes an absolute path; write file:///{parsed.netloc}…")
        return FileStore(Path(unquote(parsed.path)))
    if parsed.scheme or not url:
        raise InvalidInput(f"store is {url!r}; use file:///absolute/path, a plain path, s3://bucket, or memory://")
    return FileStore(Path(url))


def sync_folder(folder: Path) -> None:
    """Make new entries of a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refused(url: str, key: str) -> str:
    return (
        f"{url} refuses access to {key!r}; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws/credentials) "
        "and the bucket's policy"
    )


def _short(error: Exception) -> str:
    return str(error).split("\n")[0][:300]
