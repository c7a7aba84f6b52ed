"""A URL becomes a store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlparse

from populace.storage.errors import InvalidInput
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.files import FileStore


def open_store(url: str) -> ObjectStore:
    """The store at `file://PATH`, a plain path, `memory://`, or
    `s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME]`."""
    parsed = urlparse(url)
    if parsed.scheme == "memory":
        from populace.storage.objects.cloud import MemoryStore  # obstore

        return MemoryStore()
    if parsed.scheme == "s3":
        from populace.storage.objects.s3 import open_s3  # the minio SDK is slow to import

        return open_s3(url)
    if parsed.scheme == "file":
        if parsed.netloc:
            raise InvalidInput(
                f"store is {url!r}: 'file://' takes an absolute path; write file:///{parsed.netloc}…"
            )
        return FileStore(Path(unquote(parsed.path)))
    if parsed.scheme or not url:
        raise InvalidInput(
            f"store is {url!r}; use file:///absolute/path, a plain path, s3://bucket, or memory://"
        )
    return FileStore(Path(url))
