"""The conformance probe: whether a store keeps the promises that exactly-once commits and erasure
rest on.

Some servers accept a condition and ignore it, or answer a range read with the whole object. A store
that fails is refused by the name of what failed.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

from populace.storage import paths
from populace.storage.errors import AlreadyExists, ObjectNotFound, OutcomeUnknown, UnsafeStore
from populace.storage.objects.contract import ObjectStore, get_range
from populace.storage.objects.files import FileStore
from populace.storage.objects.open import open_store

NUM_WRITERS = 32

_passed: set[str] = set()


def require_safe(store: ObjectStore, population: str, make_bucket: bool = False) -> None:
    """Probe `store` below the prefix of `population`, once per process. Raises `UnsafeStore`."""
    if store.url in _passed and not store.url.startswith("memory:"):
        return
    if store.url.startswith("s3:"):
        from populace.storage.objects.bucket import Bucket

        bucket = Bucket(store.url)
        if make_bucket:
            bucket.ensure()
        bucket.check()
    probe(store, paths.probe_folder(population, uuid.uuid4().hex))
    _passed.add(store.url)


def probe(store: ObjectStore, prefix: str) -> None:
    """Every promise of `ObjectStore` that a server could break. Leaves nothing behind."""
    first, second = f"{prefix}/a", f"{prefix}/b"
    try:
        _check_create_race(store, first)
        _check_reads(store, second)
        _check_listing(store, prefix, first, second)
        store.delete(second)
        with contextlib.suppress(ObjectNotFound):
            store.head(second)
            raise UnsafeStore(f"delete: {store.url} still has {second!r} after it was deleted")
    finally:
        with contextlib.suppress(Exception):  # what failed above is the news
            store.delete(first)
            store.delete(second)
            if isinstance(plain := open_store(store.url), FileStore):
                (plain.root / prefix).rmdir()


def _check_create_race(store: ObjectStore, key: str) -> None:
    together = threading.Barrier(NUM_WRITERS)

    def create(writer: int) -> str:
        together.wait()
        try:
            store.create(key, f"{writer:04d}".encode())
        except AlreadyExists:
            return "lost"
        except OutcomeUnknown:
            return "unknown"
        return "won"

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        outcomes = list(pool.map(create, range(NUM_WRITERS)))
    winner = int(store.get(key))
    num_won = outcomes.count("won")
    if num_won > 1 or (num_won == 0 and outcomes[winner] != "unknown"):
        raise UnsafeStore(
            f"create: {num_won} of {NUM_WRITERS} racing creates of one key succeeded in "
            f"{store.url}; exactly one may. "
            "The server ignores If-None-Match; use MinIO, AWS S3, SeaweedFS or a local folder"
        )
    if num_won == 1 and outcomes[winner] != "won":
        raise UnsafeStore(
            f"create: a create that lost overwrote the winner's object in {store.url}"
        )


def _check_reads(store: ObjectStore, key: str) -> None:
    body = bytes(range(256)) * 16
    store.put(key, b"before")
    store.put(key, body)
    if store.get(key) != body:
        raise UnsafeStore(
            f"read after write: {store.url} answered with an older object than the last one put"
        )
    for offset, size in ((0, 5), (1000, 100), (len(body) - 7, 7)):
        if get_range(store, key, offset, size) != body[offset : offset + size]:
            raise UnsafeStore(
                f"range reads: {store.url} answered bytes {offset}+{size} with other bytes"
            )
    if store.head(key) != len(body):
        raise UnsafeStore(
            f"head: {store.url} reports {store.head(key)} bytes for an object of {len(body)}"
        )


def _check_listing(store: ObjectStore, prefix: str, first: str, second: str) -> None:
    if (found := list(store.list(prefix))) != [first, second]:
        raise UnsafeStore(f"listing: {store.url} lists {found} where {[first, second]} are")
    if (found := list(store.list(prefix, after=first))) != [second]:
        raise UnsafeStore(
            f"listing: {store.url} lists {found} after {first!r} where only {second!r} is"
        )
