"""Where an adapter's bytes are: hot in the slab, warm in memory, near on the local disk, cold in
the store.

    prefetch   cold or near -> warm, in the background, one wave ahead
    page_in    warm -> hot; waits for what is still on its way
    evict      hot -> warm, if it is a committed revision

The store is the only place that adapters are written to, by commits; every other tier may lose
anything at any time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from populace.configs.schema import ResidencySettings
from populace.storage.errors import InvalidInput
from populace.storage.keys.user_keys import UserKeys
from populace.storage.log.loading import BlobRequest, load_wave, open_sealed
from populace.storage.lru import Lru
from populace.storage.objects.contract import ObjectStore
from populace.workers.adapters.near import NearTier
from populace.workers.adapters.slab import Slab
from populace.workers.batch import AdapterKey, AdapterRef, Paging

Blob = bytes | memoryview


@dataclass(frozen=True, slots=True)
class WarmBlobs:
    """One revision's bytes in memory."""

    weights: Blob
    moments: Blob | None

    @property
    def size_bytes(self) -> int:
        return len(self.weights) + (len(self.moments) if self.moments is not None else 0)

    def serves(self, ref: AdapterRef, with_moments: bool) -> bool:
        return not (with_moments and ref.moments is not None and self.moments is None)


class Residency:
    """The tiers of one shard, by revision. A slot that was written without a commit must be
    evicted."""

    def __init__(
        self, slab: Slab, store: ObjectStore, keys: UserKeys, settings: ResidencySettings
    ) -> None:
        self.slab, self.store, self.keys = slab, store, keys
        self.near = (
            NearTier(Path(settings.near_folder), int(settings.near_mb * 1e6))
            if settings.near_mb
            else None
        )
        self._hot = Lru[AdapterKey](slab.capacity)
        self._warm = Lru[AdapterKey](int(settings.warm_mb * 1e6))
        self._blobs: dict[AdapterKey, WarmBlobs] = {}
        self._wanted: frozenset[AdapterKey] = frozenset()
        """The wave that was prefetched last: what is warm of it stays so."""
        self._loading: dict[AdapterKey, Future[dict[AdapterKey, tuple[WarmBlobs, str]]]] = {}
        self._loader = ThreadPoolExecutor(2, thread_name_prefix="populace-page")
        self._has_moments: dict[AdapterKey, bool] = {}
        """Whether a slot that may be trained in holds moments, or zeros in their place."""

    def prefetch(self, refs: Sequence[AdapterRef]) -> None:
        """Start loading what isn't in memory, with moments, and return at once. A load that
        somebody waits for already is shared."""
        self._wanted = frozenset(ref.key for ref in refs)
        for key, future in list(self._loading.items()):
            if key not in self._wanted and future.done():  # of a wave that was given up
                del self._loading[key]
                if future.exception() is None:
                    self._warm_up(key, future.result()[key][0])
        missing = [
            ref
            for ref in self._missing(refs, True)
            if ref.weights is not None and not self._is_warm(ref, True)
        ]
        self._start_loading([ref for ref in missing if ref.key not in self._loading], True)

    def page_in(
        self, refs: Iterable[AdapterRef], with_moments: bool, keep: Collection[AdapterKey] = ()
    ) -> Paging:
        """Make all of `refs` hot together, without evicting any of `keep`. Every blob is
        verified."""
        refs = list({ref.key: ref for ref in refs}.values())
        wanted = {ref.key for ref in refs}
        read = self.slab.being_read
        staying = wanted | set(keep) | set(read)
        # What is read is copied before it is trained, which takes a slot too.
        beside = self.slab.num_beside + (self.slab.to_copy(wanted) if with_moments else 0)
        needed = len({key for key in staying if key in wanted or key in self.slab.slots}) + beside
        if needed > self.slab.capacity:
            raise InvalidInput(
                f"{needed} adapters are needed at once but scheduler.slots is "
                f"{self.slab.capacity}; raise it"
            )
        missing = self._missing(refs, with_moments)
        found = Counter(
            hot=len(refs) - len(missing), new=sum(ref.weights is None for ref in missing)
        )
        # The blobs first: a damaged one must not leave a half-filled slot.
        started = time.monotonic()
        blobs = self._blobs_of(
            [ref for ref in missing if ref.weights is not None], with_moments, found
        )
        waited_s = time.monotonic() - started
        self._hot.capacity = self.slab.capacity - beside
        for victim in self._hot.shrink(staying):
            self._cool(victim)
        for ref in missing:
            self._drop_hot(ref.key)
            for victim in self._hot.put(ref.key, 1, staying):
                self._cool(victim)
            self.slab.take(ref.key, ref.spec, ref.seed)
            if ref.weights is not None:
                own = blobs[ref.key]
                self.slab.load(
                    ref.key,
                    own.weights,
                    own.moments if ref.moments is not None and with_moments else None,
                    ref.experts,
                )
            else:
                self.slab.initialise(ref.key)
            if with_moments:
                self._has_moments[ref.key] = ref.moments is not None
        for ref in refs:  # in their order, not a set's: all shards must evict alike
            self._hot.touch(ref.key)
        hot = tuple(dict.fromkeys(key.pseudonym for key in self.slab.slots))
        num_near = 0 if self.near is None else len(self.near)
        return Paging(
            found=dict(found),
            waited_s=waited_s,
            hot=hot,
            num_warm=len(self._warm),
            num_near=num_near,
        )

    def forget(self, pseudonyms: Iterable[str]) -> None:
        """Drop every revision and the key of forgotten users, from every tier."""
        gone = set(pseudonyms)
        for future in list(self._loading.values()):
            future.exception()
        self._loading.clear()
        for key in [key for key in self.slab.slots if key.pseudonym in gone]:
            self._drop_hot(key)
        for key in [key for key in self._blobs if key.pseudonym in gone]:
            self._drop_warm(key)
        if self.near is not None:
            self.near.forget(gone)
        self.keys.drop(gone)

    def evict(self, keys: Iterable[AdapterKey]) -> None:
        """Drop slots whose content may be no revision: nothing of it is kept. A revision that was
        copied to be trained, because somebody reads it, stays."""
        for key in list(keys):
            if not self.slab.drop_trained(key):
                self._drop_hot(key)

    def committed(self, old: AdapterKey, new: AdapterKey) -> None:
        """What was trained in the slot of `old` is now revision `new`."""
        if not self.slab.rename(old, new):
            self._hot.drop(old)
            self._has_moments.pop(old, None)
        self._hot.capacity = self.slab.capacity - self.slab.num_beside
        for victim in self._hot.put(new, 1, {new, *self.slab.being_read}):
            self._cool(victim)
        self._has_moments[new] = True
        self._drop_warm(old)

    def _missing(self, refs: Iterable[AdapterRef], with_moments: bool) -> list[AdapterRef]:
        return [
            ref
            for ref in refs
            if ref.key not in self.slab.slots
            # A revision that stopped being the tip starts from zero again, also where its moments
            # are still hot.
            or (with_moments and self._has_moments.get(ref.key) != (ref.moments is not None))
        ]

    def _is_warm(self, ref: AdapterRef, with_moments: bool) -> bool:
        return ref.key in self._blobs and self._blobs[ref.key].serves(ref, with_moments)

    def _blobs_of(
        self, refs: Sequence[AdapterRef], with_moments: bool, found: Counter[str]
    ) -> dict[AdapterKey, WarmBlobs]:
        """Bytes of every one of `refs`, from wherever they are; counts where."""
        blobs, waiting = {}, []
        for ref in refs:
            if self._is_warm(ref, with_moments):
                blobs[ref.key] = self._blobs[ref.key]
                self._warm.touch(ref.key)
                found["warm"] += 1
            else:
                waiting.append(ref)
        shared = {
            ref.key: self._loading[ref.key]
            for ref in waiting
            if ref.key in self._loading and with_moments
        }
        own = self._start_loading([ref for ref in waiting if ref.key not in shared], with_moments)
        for ref in waiting:
            future = shared.get(ref.key, own)
            assert future is not None
            try:
                loaded, tier = future.result()[ref.key]
            finally:
                for key in [key for key, other in self._loading.items() if other is future]:
                    del self._loading[key]
            blobs[ref.key] = loaded
            found["prefetched" if ref.key in shared else tier] += 1
            self._warm_up(ref.key, loaded)
        return blobs

    def _start_loading(
        self, refs: Sequence[AdapterRef], with_moments: bool
    ) -> Future[dict[AdapterKey, tuple[WarmBlobs, str]]] | None:
        if not refs:
            return None
        future = self._loader.submit(self._load, refs, with_moments)
        self._loading.update(dict.fromkeys((ref.key for ref in refs), future))
        return future

    def _load(
        self, refs: Sequence[AdapterRef], with_moments: bool
    ) -> dict[AdapterKey, tuple[WarmBlobs, str]]:
        """From near and cold, each blob checked against its manifest's digest; runs in a thread."""
        requests = [ref.requests(with_moments) for ref in refs]
        everything = [request for own in requests for request in own]
        sealed = {} if self.near is None else self.near.get(everything)
        missing = [request for request in everything if request not in sealed]
        opened: dict[BlobRequest, Blob] = {
            request: open_sealed(self.keys, request, body) for request, body in sealed.items()
        }
        keep_sealed = None if self.near is None else self.near.put
        opened |= dict(
            zip(missing, load_wave(self.store, self.keys, missing, keep_sealed), strict=True)
        )
        result = {}
        for ref, own in zip(refs, requests, strict=True):
            parts = [opened[request] for request in own]
            tier = "near" if all(request in sealed for request in own) else "cold"
            # Copies: one wave's views share one buffer, which would stay as long as the last of
            # them.
            result[ref.key] = (
                WarmBlobs(bytes(parts[0]), bytes(parts[1]) if len(parts) > 1 else None),
                tier,
            )
        return result

    def _warm_up(self, key: AdapterKey, blobs: WarmBlobs) -> None:
        self._blobs[key] = blobs
        for gone in self._warm.put(key, blobs.size_bytes, self._wanted):
            self._blobs.pop(gone, None)

    def _drop_warm(self, key: AdapterKey) -> None:
        self._warm.drop(key)
        self._blobs.pop(key, None)

    def _cool(self, key: AdapterKey) -> None:
        """A committed revision leaves its slot; its bytes stay warm, if this shard has all of
        them."""
        if key.revision and key not in self._blobs and self.slab.shard.num_shards == 1:
            has_moments = self._has_moments.get(key, False)
            self._warm_up(key, WarmBlobs(*self.slab.blobs(key, with_moments=has_moments)))
        self.slab.drop(key)
        self._has_moments.pop(key, None)

    def _drop_hot(self, key: AdapterKey) -> None:
        if key in self.slab.slots:
            self.slab.drop(key)
        self._hot.drop(key)
        self._has_moments.pop(key, None)
