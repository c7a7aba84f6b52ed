"""Loading many blobs at once: neighbours in a pack share one range request, requests run in
parallel, and every blob is verified and decrypted straight into the memory that the caller gets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from populace.storage.keys.sealing import OVERHEAD_BYTES
from populace.storage.keys.user_keys import UserKeys
from populace.storage.log.pack import BlobPlace, check_blob
from populace.storage.objects.contract import ObjectStore

MAX_GAP_BYTES = 64 << 10
"""Bytes between two blobs that are cheaper to read over than to ask twice for."""

MAX_REQUEST_BYTES = 4 << 20

NUM_REQUESTS = 8
"""Range requests in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRequest:
    """One part of one revision."""

    pseudonym: str
    revision: int
    part: str
    place: BlobPlace

    @property
    def context(self) -> str:
        return blob_context(self.part, self.revision)


def blob_context(part: str, revision: int) -> str:
    """What a blob is sealed as (see `UserKeys.seal`): it opens as nothing else."""
    return f"{part}@{revision}"


def open_sealed(keys: UserKeys, request: BlobRequest, sealed: bytes) -> bytes:
    """The decrypted bytes of a blob whose digest was checked."""
    return keys.open(request.pseudonym, sealed, request.context)


def load_wave(
    store: ObjectStore,
    keys: UserKeys,
    requests: Sequence[BlobRequest],
    keep_sealed: Callable[[BlobRequest, memoryview], None] | None = None,
) -> list[memoryview]:
    """The decrypted bytes of every request, in order, as views of one buffer. Raises `Damaged` for
    bytes that are not the ones committed, `Forgotten` for a forgotten user. `keep_sealed` gets the
    bytes as they are stored, verified; it is called from several threads."""
    sizes = [request.place.size_bytes - OVERHEAD_BYTES for request in requests]
    whole = memoryview(bytearray(sum(sizes)))
    views, start = [], 0
    for size in sizes:
        views.append(whole[start : start + size])
        start += size
    with ThreadPoolExecutor(NUM_REQUESTS, thread_name_prefix="populace-load") as pool:
        runs = _neighbours(requests)
        for done in [
            pool.submit(_load_run, store, keys, requests, run, views, keep_sealed) for run in runs
        ]:
            done.result()
    return views


def _neighbours(requests: Sequence[BlobRequest]) -> Iterable[list[int]]:
    """Indices of requests that one range request answers together."""
    order = sorted(
        range(len(requests)),
        key=lambda index: (requests[index].place.pack, requests[index].place.offset),
    )
    run: list[int] = []
    for index in order:
        place = requests[index].place
        if run:
            first, last = requests[run[0]].place, requests[run[-1]].place
            gap = place.offset - (last.offset + last.size_bytes)
            size = place.offset + place.size_bytes - first.offset
            if place.pack != first.pack or gap > MAX_GAP_BYTES or size > MAX_REQUEST_BYTES:
                yield run
                run = []
        run.append(index)
    if run:
        yield run


def _load_run(
    store: ObjectStore,
    keys: UserKeys,
    requests: Sequence[BlobRequest],
    run: list[int],
    views: Sequence[memoryview],
    keep_sealed: Callable[[BlobRequest, memoryview], None] | None,
) -> None:
    first, last = requests[run[0]].place, requests[run[-1]].place
    buffer = memoryview(bytearray(last.offset + last.size_bytes - first.offset))
    num_read = store.read_into(first.pack, first.offset, buffer)
    for index in run:
        request, place = requests[index], requests[index].place
        start = place.offset - first.offset
        sealed = buffer[start : min(start + place.size_bytes, num_read)]
        check_blob(place, sealed, hashlib.sha256(sealed).hexdigest())
        keys.open_into(request.pseudonym, sealed, request.context, views[index])
        if keep_sealed is not None:
            keep_sealed(request, sealed)
