"""The catalog as a folder of Parquet files, for DuckDB, pandas, or whatever reads Parquet.

adapters.parquet   pseudonym, partition, spec, seed, tip, serving, consumed position, forgotten
revisions.parquet  pseudonym, revision, parent, seq, num_trained, promoted, pinned, kept, size_bytes
uses.parquet       pseudonym, revision, partition, segment: what each revision learned from
verdicts.parquet   pseudonym, partition, seq, decision, judged
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.columns import Rows, ragged
from populace.storage.catalog.tables import BARE, DECISIONS, DROPPED, FORGOTTEN, PINNED, PROMOTED
from populace.storage.errors import InvalidInput


def export_catalog(catalog: Catalog, folder: Path) -> dict[str, int]:
    """Write the files into a new or empty folder; returns the number of rows of each table."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"folder {str(folder)!r} is there already and not empty; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "adapters": _adapters(catalog),
        "revisions": _revisions(catalog),
        "uses": _uses(catalog),
        "verdicts": _verdicts(catalog),
    }
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    return {name: table.num_rows for name, table in tables.items()}


def _adapters(catalog: Catalog) -> Any:
    table = catalog.adapters
    rows = np.flatnonzero(table["flags"] & BARE == 0)
    specs = pa.array(catalog.specs.values, pa.string())
    return pa.table(
        {
            "pseudonym": catalog.pseudonyms(rows),
            "spec": pa.DictionaryArray.from_arrays(table["spec"][rows].astype(np.int32), specs),
            **{
                name: table[name][rows]
                for name in (
                    "partition",
                    "seed",
                    "tip",
                    "serving",
                    "consumed_segment",
                    "consumed_row",
                )
            },
            "is_forgotten": (table["flags"][rows] & FORGOTTEN) > 0,
        }
    )


def _revisions(catalog: Catalog) -> Any:
    table = catalog.revisions
    blob, _ = ragged(table["first_blob"], table["num_blobs"])
    owner = np.repeat(np.arange(table.size), table["num_blobs"])
    size = np.bincount(owner, catalog.blobs["size"][blob], minlength=table.size).astype(np.int64)
    return pa.table(
        {
            "pseudonym": catalog.pseudonyms(table["adapter"]),
            **{name: table[name] for name in ("revision", "parent", "seq", "num_trained")},
            "is_promoted": (table["flags"] & PROMOTED) > 0,
            "is_pinned": (table["flags"] & PINNED) > 0,
            "is_kept": (table["flags"] & DROPPED) == 0,
            "size_bytes": size,
        }
    )


def _uses(catalog: Catalog) -> Any:
    table = catalog.revisions
    use, _ = ragged(table["first_use"], table["num_uses"])
    owner: Rows = np.repeat(np.arange(table.size), table["num_uses"])
    adapter = table["adapter"][owner]
    return pa.table(
        {
            "pseudonym": catalog.pseudonyms(adapter),
            "revision": table["revision"][owner],
            "partition": catalog.adapters["partition"][adapter],
            "segment": catalog.uses["segment"][use],
        }
    )


def _verdicts(catalog: Catalog) -> Any:
    table = catalog.notes
    rows = np.flatnonzero(table["decision"] != DECISIONS.index("settled"))
    return pa.table(
        {
            "pseudonym": catalog.pseudonyms(table["adapter"][rows]),
            "partition": catalog.adapters["partition"][table["adapter"][rows]],
            "seq": table["seq"][rows],
            "decision": pa.DictionaryArray.from_arrays(
                table["decision"][rows].astype(np.int32), pa.array(DECISIONS, pa.string())
            ),
            "judged": table["judged"][rows],
        }
    )
