"""Packs: one safetensors file that holds the blobs of a wave's new revisions, read by range.

Each blob is a flat U8 tensor named `weights/<pseudonym>@<revision>`, `moments/…` or `evidence/…`. A
blob's place (`BlobPlace`) stands in the manifest with its digest, so one range request reads and
verifies it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import save

from populace.storage.errors import Damaged
from populace.storage.objects.contract import ObjectStore, get_range


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobPlace:
    """Where one blob lies and what its bytes must hash to."""

    pack: str
    offset: int
    size_bytes: int
    sha256: str


def build_pack(key: str, blobs: Mapping[str, bytes]) -> tuple[bytes, dict[str, BlobPlace]]:
    """The body of the pack `key` and the place of every blob in it. All blobs must be non-empty."""
    body = save({name: np.frombuffer(blob, dtype=np.uint8) for name, blob in blobs.items()})
    (header_size,) = struct.unpack("<Q", body[:8])
    header = json.loads(body[8 : 8 + header_size])
    data_start = 8 + header_size
    places = {}
    for name, blob in blobs.items():
        begin, end = header[name]["data_offsets"]
        places[name] = BlobPlace(
            pack=key,
            offset=data_start + begin,
            size_bytes=end - begin,
            sha256=hashlib.sha256(blob).hexdigest(),
        )
    return body, places


def read_blob(store: ObjectStore, place: BlobPlace) -> bytes:
    """The blob at `place` as stored; raises `Damaged` if the bytes there are not the ones that were
    committed."""
    blob = get_range(store, place.pack, place.offset, place.size_bytes)
    check_blob(place, blob, hashlib.sha256(blob).hexdigest())
    return blob


def check_blob(place: BlobPlace, blob: bytes | memoryview, sha256: str) -> None:
    """Raises `Damaged` unless `blob`, whose digest is `sha256`, is what `place` says."""
    if len(blob) != place.size_bytes or sha256 != place.sha256:
        raise Damaged(
            f"blob at {place.pack}+{place.offset} ({place.size_bytes} bytes) does not match the "
            "digest "
            f"{place.sha256} of its manifest; restore the pack from a copy"
        )
