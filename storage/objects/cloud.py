"""Any store that obstore speaks to, and one in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

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

from populace.storage.errors import (
    AlreadyExists,
    InvalidInput,
    ObjectNotFound,
    OutcomeUnknown,
    StoreUnavailable,
)


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
                body = memoryview(
                    obstore.get_range(self._store, key, start=offset, length=len(into))
                )
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
            if any(
                word in str(error)
                for word in ("AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId")
            ):
                raise InvalidInput(
                    _refused(self.url, key)
                ) from error  # listings have no error of their own for it
            raise StoreUnavailable(
                f"object {key!r} in {self.url} can't be read: {_short(error)}"
            ) from error

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
            raise OutcomeUnknown(
                f"{self.url} did not say whether {key!r} was written: {_short(error)}"
            ) from error


class MemoryStore(ObstoreStore):
    """In this process only; for tests."""

    def __init__(self) -> None:
        memory = _ObstoreMemory()
        super().__init__("memory://", memory, memory)


def _refused(url: str, key: str) -> str:
    return (
        f"{url} refuses access to {key!r}; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or "
        "~/.aws/credentials) "
        "and the bucket's policy"
    )


def _short(error: Exception) -> str:
    return str(error).split("\n")[0][:300]
