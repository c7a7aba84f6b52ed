"""A local folder as a store. Durable: file and folder are synced."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from populace.storage.errors import AlreadyExists, ObjectNotFound, OutcomeUnknown, StoreUnavailable

_TEMPORARY = ".tmp-"


class FileStore:
    """A local folder. Durable: a write returns after file and folder are synced, so that a power
    cut leaves either the whole object or none (obstore's local store never syncs)."""

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
        return (
            sorted(path.name for path in self.root.iterdir() if path.is_dir())
            if self.root.is_dir()
            else []
        )

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
            raise StoreUnavailable(
                f"object {key!r} in {self.url} can't be read: {error}"
            ) from error

    def _write(self, key: str, body: bytes, publish: Callable[[str, Path], None]) -> None:
        path = self.root / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(
                prefix=f"{_TEMPORARY}{path.name}-", dir=path.parent
            )
        except OSError as error:
            raise StoreUnavailable(
                f"object {key!r} can't be written to {self.url}: {error}"
            ) from error
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
        except FileExistsError:
            raise AlreadyExists(f"object {key!r} is already in {self.url}") from None
        except OSError as error:  # a full disk, a lost mount; the object is not there
            raise StoreUnavailable(
                f"object {key!r} can't be written to {self.url}: {error}"
            ) from error
        finally:
            Path(temporary).unlink(missing_ok=True)
        try:
            self._sync(path.parent)
        except OSError as error:
            raise OutcomeUnknown(
                f"object {key!r} in {self.url} may not be durable: {error}"
            ) from error

    def _sync(self, folder: Path) -> None:
        """A new folder's own entry is only durable once the folder above it is synced, up to the
        root."""
        sync_folder(folder)
        if folder not in self._durable_folders:
            for above in folder.parents:
                if above == self.root.parent:
                    break
                sync_folder(above)
            self._durable_folders.add(folder)


def sync_folder(folder: Path) -> None:
    """Make new entries of a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
