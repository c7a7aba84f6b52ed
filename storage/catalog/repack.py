"""Retention and garbage: old revisions leave the packs, and packs that nothing names are deleted.

Only the owner of a partition does either. Neither uses a clock: an old epoch's wave record can't
land behind the owner's claim, so what an older epoch left without a record will never get one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from populace.storage import paths
from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.columns import Rows, ragged
from populace.storage.catalog.tables import FADED, FORGOTTEN, PARTS, PINNED, PROMOTED
from populace.storage.errors import ObjectNotFound
from populace.storage.log.owner import Owner
from populace.storage.log.pack import build_pack
from populace.storage.log.records import MovedBlob, Repack
from populace.storage.objects.contract import get_range

logger = logging.getLogger(__name__)

MAX_PACK_BYTES = 256 << 20

MIN_DEAD_SHARE = 0.25
"""A pack is rewritten once this share of its bytes is droppable; with bytes of a forgotten user, at
once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionRule:
    """Which revisions stay: an adapter's last ones, its tip, what serves or ever was promoted,
    what is pinned. Moments stay for tips and for what was pinned while it was the tip; evidence
    stays where a revision that stays is re-derived through it, so that every one of them can be
    replayed."""

    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RepackReport:
    """What a repack did."""

    num_moved: int = 0
    num_dropped: int = 0
    num_packs_deleted: int = 0

    def __add__(self, other: RepackReport) -> RepackReport:
        return RepackReport(
            **{name: value + getattr(other, name) for name, value in asdict(self).items()}
        )


@dataclass(frozen=True, slots=True)
class _Blobs:
    """The blobs of a partition that are still there: row of the blob, of its revision, and whether
    it may go."""

    row: Rows
    revision: Rows
    is_dead: NDArray[np.bool_]
    is_forgotten: NDArray[np.bool_]


def repack(owner: Owner, catalog: Catalog, rule: RetentionRule) -> RepackReport:
    """Rewrite the partition's packs without what the rule lets go. `catalog` has applied all of the
    log."""
    report = RepackReport()
    blobs = _blobs(catalog, owner.reader.partition, rule)
    for batch in _batches(catalog, blobs, _packs_to_rewrite(catalog, blobs)):
        try:
            report += _rewrite(owner, catalog, blobs, batch, rule)
        except ObjectNotFound as error:
            logger.error(
                "packs stay as they are, one of them is gone: %s; restore it from a copy", error
            )
    return report + RepackReport(num_packs_deleted=collect_garbage(owner, catalog))


def collect_garbage(owner: Owner, catalog: Catalog) -> int:
    """Delete the partition's packs that no record names and none ever will; returns how many."""
    reader, num_deleted = owner.reader, 0
    live = catalog.referenced_packs(reader.partition)
    for key in list(reader.log.store.list(paths.pack_folder(reader.population, reader.partition))):
        epoch = paths.epoch_of_pack(key)
        # A pack of this epoch that this owner hasn't named may be one whose record is on its way.
        if key not in live and (epoch < owner.epoch or key in owner.own_packs):
            reader.log.store.delete(key)
            num_deleted += 1
    return num_deleted


def _blobs(catalog: Catalog, partition: int, rule: RetentionRule) -> _Blobs:
    adapters, revisions = catalog.adapters, catalog.revisions
    mine = np.flatnonzero(adapters["partition"][revisions["adapter"]] == partition)
    adapter, number, flags = (revisions[name][mine] for name in ("adapter", "revision", "flags"))
    is_forgotten = (adapters["flags"][adapter] & FORGOTTEN) > 0
    is_tip = number == adapters["tip"][adapter]
    newest = adapters["next_revision"][adapter].astype(np.int64) - 1
    stays = (number > newest - rule.last) | is_tip | (number == adapters["serving"][adapter])
    stays |= (flags & (PROMOTED | PINNED)) > 0
    row, _ = ragged(revisions["first_blob"][mine], revisions["num_blobs"][mine])
    of = np.repeat(np.arange(len(mine)), revisions["num_blobs"][mine])
    there = catalog.blobs["size"][row] > 0
    row, of = row[there], of[there]
    stays &= ~is_forgotten
    part, has_moments = catalog.blobs["part"][row], stays & (flags & FADED == 0)
    evidence = _is_replayed_through(adapter, number, revisions["parent"][mine], stays)
    lives = np.select(
        [part == PARTS.index("moments"), part == PARTS.index("evidence")],
        [has_moments[of], evidence[of]],
        stays[of],
    )
    return _Blobs(row=row, revision=mine[of], is_dead=~lives, is_forgotten=is_forgotten[of])


def _is_replayed_through(
    adapter: NDArray[np.uint32],
    number: NDArray[np.uint32],
    parent: NDArray[np.uint32],
    stays: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Which revisions a replay of those that stay repeats: themselves and all their ancestors."""
    key = adapter.astype(np.uint64) << np.uint64(32) | number
    by_key = np.argsort(key)
    parent_at = by_key[np.searchsorted(key[by_key], key - number + parent).clip(max=len(key) - 1)]
    needed = stays.copy()
    # A parent's number is below its child's, so descending numbers meet every child first.
    descending = np.argsort(number, kind="stable")[::-1]
    for rows in np.split(descending, np.flatnonzero(np.diff(number[descending])) + 1):
        needed[parent_at[rows[needed[rows] & (parent[rows] > 0)]]] = True
    return needed


def _packs_to_rewrite(catalog: Catalog, blobs: _Blobs) -> Rows:
    pack, size = (
        catalog.blobs["pack"][blobs.row],
        catalog.blobs["size"][blobs.row].astype(np.float64),
    )
    total = np.bincount(pack, size)
    dead = np.bincount(pack, size * blobs.is_dead, minlength=len(total))
    forgotten = np.bincount(pack, blobs.is_forgotten, minlength=len(total))
    return np.flatnonzero((dead > 0) & ((dead >= MIN_DEAD_SHARE * total) | (forgotten > 0)))


def _batches(catalog: Catalog, blobs: _Blobs, packs: Rows) -> Iterator[Rows]:
    """Indices into `blobs`, by whole old packs, as many as fit into one new pack."""
    pack = catalog.blobs["pack"][blobs.row]
    chosen = np.flatnonzero(np.isin(pack, packs))
    chosen = chosen[np.argsort(pack[chosen], kind="stable")]
    size = np.where(blobs.is_dead[chosen], 0, catalog.blobs["size"][blobs.row[chosen]]).astype(
        np.int64
    )
    start = filled = 0
    bounds = [*(np.flatnonzero(np.diff(pack[chosen])) + 1).tolist(), len(chosen)]
    last = 0
    for bound in bounds:
        own = int(size[last:bound].sum())
        if filled and filled + own > MAX_PACK_BYTES:
            yield chosen[start:last]
            start, filled = last, 0
        filled, last = filled + own, bound
    if start < len(chosen):
        yield chosen[start:]


def _rewrite(
    owner: Owner, catalog: Catalog, blobs: _Blobs, batch: Rows, rule: RetentionRule
) -> RepackReport:
    """One new pack with what stays of some old ones, and the record that says so."""
    store, key = owner.reader.log.store, owner.new_pack("repack")
    names = catalog.pseudonyms(catalog.revisions["adapter"][blobs.revision[batch]])
    numbers = catalog.revisions["revision"][blobs.revision[batch]].tolist()
    parts = [PARTS[part] for part in catalog.blobs["part"][blobs.row[batch]]]
    bodies: dict[str, bytes] = {}
    kept, dropped = [], []
    for index, name, number, part in zip(batch.tolist(), names, numbers, parts, strict=True):
        if blobs.is_dead[index]:
            dropped.append((name, number, part))
        else:
            place = catalog.place_of(int(blobs.row[index]))
            # As they are: a damaged blob keeps its digest, and is found by who loads or verifies
            # it.
            bodies[f"{part}/{name}@{number}"] = get_range(
                store, place.pack, place.offset, place.size_bytes
            )
            kept.append((name, number, part, place))
    moved = []
    if bodies:
        body, places = build_pack(key, bodies)
        store.put(key, body)
        for name, number, part, old in kept:
            place = places[f"{part}/{name}@{number}"]
            moved.append(
                MovedBlob(
                    pseudonym=name, revision=number, part=part, offset=place.offset,
                    size_bytes=place.size_bytes,
                    sha256=old.sha256,
                )
            )  # fmt: skip
    record = Repack(rule=asdict(rule), pack=key, moved=moved, dropped=dropped)
    catalog.apply(owner.append(record), record)
    owner.own_packs.add(key)
    return RepackReport(num_moved=len(moved), num_dropped=len(dropped))
