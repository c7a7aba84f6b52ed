"""Where an adapter's bytes are: hot in the slab or cold in the store. Loads what a wave needs, evicts what it
doesn't, least recently used first."""

from __future__ import annotations

from collections.abc import Iterable

from populace.storage.errors import InvalidInput
from populace.storage.keys import UserKeys
from populace.storage.loading import load_wave
from populace.storage.objects import ObjectStore
from populace.workers.batch import AdapterKey, AdapterRef
from populace.workers.slab import Slab


class Residency:
    """The slab's contents, by revision. A slot that was written without a commit must be evicted."""

    def __init__(self, slab: Slab, store: ObjectStore, keys: UserKeys) -> None:
        self.slab, self.store, self.keys = slab, store, keys
        self._last_used: dict[AdapterKey, int] = {}
        self._clock = 0
        self._has_moments: dict[AdapterKey, bool] = {}
        """Whether a slot that may be trained in holds moments, or zeros in their place."""

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
        missing = [
            ref
            for ref in {ref.key: ref for ref in refs}.values()
            if ref.key not in self.slab.slots
            # A revision that stopped being the tip starts from zero again, also where its moments are still hot.
            or (with_moments and self._has_moments.get(ref.key) != (ref.moments is not None))
        ]
        # The blobs first: a damaged one must not leave a half-filled slot.
        requests = [ref.requests(with_moments) for ref in missing]
        blobs = iter(load_wave(self.store, self.keys, [request for own in requests for request in own]))
        loaded = [[next(blobs) for _ in own] for own in requests]
        for ref, parts in zip(missing, loaded, strict=True):
            self.evict([ref.key])
            if len(self.slab.slots) == self.slab.capacity:
                idle = [key for key in self.slab.slots if key not in wanted]
                self.evict([min(idle, key=lambda key: self._last_used[key])])
            self.slab.take(ref.key, ref.spec, ref.seed)
            if parts:
                self.slab.load(ref.key, parts[0], parts[1] if len(parts) > 1 else None, ref.experts)
            else:
                self.slab.initialise(ref.key)
            if with_moments:
                self._has_moments[ref.key] = ref.moments is not None
        self._last_used.update(dict.fromkeys(wanted, self._clock))
        return len(missing)

    def forget(self, pseudonyms: Iterable[str]) -> None:
        """Drop every revision and the key of forgotten users."""
        gone = set(pseudonyms)
        self.evict([key for key in self.slab.slots if key.pseudonym in gone])
        self.keys.drop(gone)

    def evict(self, keys: Iterable[AdapterKey]) -> None:
        for key in list(keys):
            if key in self.slab.slots:
                self.slab.drop(key)
            self._last_used.pop(key, None)
            self._has_moments.pop(key, None)

    def committed(self, old: AdapterKey, new: AdapterKey) -> None:
        """What was trained in the slot of `old` is now revision `new`."""
        self.slab.rename(old, new)
        self._last_used[new] = self._last_used.pop(old)
        self._has_moments.pop(old, None)
        self._has_moments[new] = True
