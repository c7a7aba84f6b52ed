"""Rows become the Arrow bytes of a segment, and back. Free of I/O and of keys."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import pyarrow as pa

from populace.storage.errors import Damaged

SCHEMA = pa.schema(
    [
        pa.field("pseudonym", pa.string(), nullable=False),
        pa.field("tag", pa.string(), nullable=False),  # keyed hash of the event id
        pa.field("sealed", pa.binary(), nullable=False),  # the event, encrypted with its user's key
    ]
)
"""One row per event; rows of one segment keep the order in which they were enqueued."""

Row = dict[str, str | bytes]


def encode_rows(rows: Sequence[Row], metadata: Mapping[str, str]) -> bytes:
    """An Arrow IPC stream, and behind its end, where Arrow's readers don't look, its sha256."""
    columns = [
        pa.array([row[name] for row in rows], kind)
        for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)
    ]
    table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(dict(metadata)))
    return with_digest([table])


def with_digest(tables: Sequence[pa.Table]) -> bytes:
    """Arrow IPC streams one after another, and their sha256."""
    sink = pa.BufferOutputStream()
    for table in tables:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    body: bytes = sink.getvalue().to_pybytes()
    return body + hashlib.sha256(body).digest()


def checked(key: str, body: bytes) -> memoryview:
    """What `with_digest` wrote, without the digest; `Damaged` when it isn't that."""
    # The digest first: some flipped bytes crash Arrow's reader instead of failing it.
    inner = memoryview(body)[:-32]
    if hashlib.sha256(inner).digest() != body[-32:]:
        raise Damaged(f"{key} is not what was written; restore it from a copy")
    return inner


def decode_rows(key: str, body: bytes) -> pa.Table:
    return pa.ipc.open_stream(checked(key, body)).read_all()


def enqueued_at(table: pa.Table) -> float:
    """When a segment was written, by its producer's clock, in seconds since 1970. Decides about
    order of service only, never about safety."""
    return float((table.schema.metadata or {}).get(b"enqueued_at", b"0"))


def partition_of(user: str, partitions: int) -> int:
    """The fixed partition of a user."""
    return (
        int.from_bytes(hashlib.blake2b(user.encode(), digest_size=8).digest(), "big") % partitions
    )
