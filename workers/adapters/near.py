"""The near tier: sealed blobs on the local disk, by digest."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from populace.storage.log.loading import BlobRequest
from populace.storage.lru import Lru

logger = logging.getLogger(__name__)


class NearTier:
    """Sealed blobs on the local disk, each in a file named by its digest: what is read is checked,
    so the folder may lose or damage anything, and several processes may share it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._files = Lru[str](max_bytes)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        there = [
            (path.stat(), path) for path in folder.glob("*/*") if not path.name.startswith(".")
        ]
        for stat, path in sorted(there, key=lambda item: item[0].st_mtime):
            for gone in self._files.put(f"{path.parent.name}/{path.name}", stat.st_size):
                (folder / gone).unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._files)

    def get(self, requests: Sequence[BlobRequest]) -> dict[BlobRequest, bytes]:
        """What is there and whole."""
        found = {}
        for request in requests:
            name = f"{request.pseudonym}/{request.place.sha256}"
            try:
                body = (self.folder / name).read_bytes()
            except OSError:
                continue
            if hashlib.sha256(body).hexdigest() == request.place.sha256:
                found[request] = body
                with self._lock:
                    if name in self._files:
                        self._files.touch(name)
            else:
                logger.warning(
                    "near copy %s is damaged; it is read from the store again", self.folder / name
                )
                self._remove(name)
        return found

    def put(self, request: BlobRequest, sealed: memoryview) -> None:
        """Keep a copy, if there is room; a disk that can't is no reason to stop."""
        name = f"{request.pseudonym}/{request.place.sha256}"
        with self._lock:
            going = self._files.put(name, len(sealed))
        for gone in going:
            (self.folder / gone).unlink(missing_ok=True)
        if name in going:
            return
        try:
            (self.folder / request.pseudonym).mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(
                dir=self.folder / request.pseudonym, prefix=".", delete=False
            ) as file:
                file.write(sealed)
            os.replace(file.name, self.folder / name)
        except OSError as error:
            logger.warning("near copy %s can't be written: %s", self.folder / name, error)
            self._remove(name)

    def forget(self, pseudonyms: Iterable[str]) -> None:
        for pseudonym in pseudonyms:
            for path in (self.folder / pseudonym).glob("*"):
                self._remove(f"{pseudonym}/{path.name}")

    def _remove(self, name: str) -> None:
        with self._lock:
            self._files.drop(name)
        (self.folder / name).unlink(missing_ok=True)
