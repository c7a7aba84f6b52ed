"""Where an adapter's bytes are: hot in the slab or cold in the store. Loads what a wave needs, evicts what it
doesn't, least recently used first."""

from __future__ import annotations

from collections.abc import Iterable

from populace.storage.errors import InvalidInput
from populace.storage.objects import ObjectStore
from populace.storage.pack import read_blob
from populace.workers.batch import AdapterKey, AdapterRef
from populace.workers.slab import Slab


class Residency:
    """The slab's contents, by revision. A slot that was written without a commit must be evicted."""

    def __init__(self, slab: Slab, store: ObjectStore) -> None:
        self.slab, self.store = slab, store
        self._last_used: dict[AdapterKey, int] = {}
        self._clock = 0
        self._has_moments: set[AdapterKey] = set()

    @property
    def num_hot(self) -> int:
        return len(self.slab.slots)

    def page_in(self, refs: Iterable[AdapterRef], with_moments: bool) -> int:
        """Make all of `refs` hot together; returns how many had to be loaded. Every blob is verified."""
        refs = list(refs)
        wanted = {ref.key for ref in refs}
        if len(wanted) > self.slab.capacity:
            raise InvalidInput(
                f"{len(wanted)} adapters are needed at once but scheduler.slots is {self.slab.capacity}; raise it"
            )
        self._clock += 1
        num_loaded = 0
        for ref in refs:
            self._last_used[ref.key] = self._clock
            if ref.key in self.slab.slots and (not with_moments or ref.key in self._has_moments):
                continue
            if ref.key in self.slab.slots:
                self.evict([ref.key])
                self._last_used[ref.key] = self._clock
            elif len(self.slab.slots) == self.slab.capacity:
                idle = [key for key in self.slab.slots if key not in wanted]
                self.evict([min(idle, key=lambda key: self._last_used[key])])
            self._load(ref, with_moments)
            num_loaded += 1
        return num_loaded

    def evict(self, keys: Iterable[AdapterKey]) -> None:
        for key in keys:
            if key in self.slab.slots:
                self.slab.drop(key)
            self._last_used.pop(key, None)
            self._has_moments.discard(key)

    def committed(self, old: AdapterKey, new: AdapterKey) -> None:
        """What was trained in the slot of `old` is now revision `new`."""
        self.slab.rename(old, new)
        self._last_used[new] = self._last_used.pop(old)
        self._has_moments.discard(old)
        self._has_moments.add(new)

    def _load(self, ref: AdapterRef, with_moments: bool) -> None:
        # The blobs first: a damaged one must not leave a half-filled slot.
        weights = None if ref.weights is None else read_blob(self.store, ref.weights)
        moments = read_blob(self.store, ref.moments) if with_moments and ref.moments is not None else None
        self.slab.take(ref.key, ref.spec, ref.seed)
        if weights is not None:
            self.slab.load(ref.key, weights, moments, ref.experts)
        if with_moments:
            self._has_moments.add(ref.key)
