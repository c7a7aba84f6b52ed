"""Heartbeats: a process that owns partitions, or runs a controller, shows that it lives, and
watches the others.

Nothing here is about safety. Two controllers that both believe that a partition is theirs collide
in its revision log, and the older claim loses.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from populace.storage import paths
from populace.storage.errors import ObjectNotFound, PopulaceError
from populace.storage.objects.contract import ObjectStore

logger = logging.getLogger(__name__)
HEARTBEAT_S = 1.0
UNKNOWN = "somebody"
"""The holder of a partition that nobody has looked at yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What was last seen at one place, and when by this process's monotonic clock it last changed.

    Example: `Life(body='{"owner": "host/71/a3", "counter": 9}', changed_s=1234.5)`."""

    body: str
    changed_s: float

    @property
    def owner(self) -> str:
        return str(json.loads(self.body)["owner"]) if self.body else ""

    @property
    def is_released(self) -> bool:
        return not self.body or bool(json.loads(self.body).get("released"))


class Heartbeat(threading.Thread):
    """Writes this process's heartbeats, and reads the others'."""

    def __init__(
        self,
        store: ObjectStore,
        population: str,
        num_partitions: int,
        name: str,
        interval_s: float,
    ) -> None:
        super().__init__(daemon=True, name="populace-heartbeat")
        self._store, self._population, self.owner = store, population, name
        self._num_partitions, self._interval_s = num_partitions, interval_s
        self._stopped = threading.Event()
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._owned: set[int] = set()
        self._controller: str | None = None
        self._on_stop: Callable[[], None] = lambda: None
        self.figures: Mapping[str, Any] = {}
        """What a controller shows of its work."""
        self.seen: dict[str, Life] = {}
        """Key -> heartbeat of the others."""

    def own(self, partition: int) -> None:
        """Beat for this partition from now on, at once: until then others see that nobody holds
        it."""
        with self._lock:
            self._owned.add(partition)
        with self._writing, contextlib.suppress(PopulaceError):  # then the next beat does
            key = paths.owner(self._population, partition)
            self._put(key, {"owner": self.owner, "counter": "claimed"})

    def drop(self, partition: int) -> None:
        """Beat no longer for a partition that somebody else has now."""
        with self._lock:
            self._owned.discard(partition)

    def disown(self, partition: int) -> None:
        """Say that this partition was released."""
        with self._writing:  # so that no beat comes after it
            self.drop(partition)
            key = paths.owner(self._population, partition)
            self._put(key, {"owner": self.owner, "released": True})

    def announce(self, controller: str, on_stop: Callable[[], None]) -> None:
        """Beat as a controller, also while it owns nothing; `on_stop` is called, again and again,
        when somebody asks it to stop."""
        self._controller, self._on_stop = controller, on_stop

    def living(self, within_s: float) -> set[str]:
        """Names of the processes that run other controllers and whose heartbeat changed lately."""
        folder = paths.controller_folder(self._population)
        now = time.monotonic()
        with self._lock:
            return {
                life.owner
                for key, life in self.seen.items()
                if key.startswith(folder)
                and not life.is_released
                and now - life.changed_s < within_s
            }

    def holder(
        self, partition: int, claim: tuple[str, float] | None, within_s: float
    ) -> str | None:
        """Who else holds a claimed partition, if its heartbeat changed lately. `claim`: whose it
        is, and when it was seen here; None: from before this process read the log."""
        with self._lock:
            life = self.seen.get(paths.owner(self._population, partition))
        if life is None:
            return UNKNOWN
        if claim is not None and life.owner != claim[0]:
            # A heartbeat from before the claim; the claim itself is one too.
            return claim[0] if time.monotonic() - claim[1] < within_s else None
        if life.is_released or time.monotonic() - life.changed_s >= within_s:
            return None
        return life.owner

    def run(self) -> None:
        counter = 0
        while True:
            try:
                self._beat(counter)
                if self._controller is not None:
                    self._look(self._controller)
            except Exception as error:  # a store that is away for a moment must not end this
                logger.warning("heartbeat of %s failed: %s", self.owner, error)
            counter += 1
            if self._stopped.wait(self._interval_s):
                return

    def stop(self) -> None:
        """Beat no more; returns when the last beat is over."""
        self._stopped.set()
        self.join()

    def _beat(self, counter: int) -> None:
        with self._writing:
            with self._lock:
                keys = [paths.owner(self._population, number) for number in sorted(self._owned)]
            for key in keys:
                self._put(key, {"owner": self.owner, "counter": counter})
            if self._controller is not None:
                body = {"owner": self.owner, "at": time.time(), "figures": self.figures}
                self._put(paths.controller(self._population, self._controller), body)

    def _look(self, controller: str) -> None:
        """Read the others' heartbeats; a listing is good enough, nothing rests on it."""
        own = paths.controller(self._population, controller)
        request = paths.stop_request(self._population, controller)
        there = list(self._store.list(paths.controller_folder(self._population)))
        keys = [key for key in there if key.endswith(".json") and key != own]
        with self._lock:
            others = set(range(self._num_partitions)) - self._owned
        keys += [paths.owner(self._population, partition) for partition in sorted(others)]
        for key in keys:
            body = read_life(self._store, key)
            with self._lock:
                known = self.seen.get(key)
                if known is None or known.body != body:
                    self.seen[key] = Life(body=body, changed_s=time.monotonic())
        if request in there and self._is_meant(request):
            self._on_stop()

    def _is_meant(self, request: str) -> bool:
        """A request that an earlier run of this name got isn't for this one."""
        body = read_life(self._store, request)
        return bool(body) and json.loads(body)["owner"] == self.owner

    def _put(self, key: str, body: dict[str, object]) -> None:
        # The nonce: an ETag of equal bodies would be equal too.
        self._store.put(key, json.dumps({**body, "nonce": secrets.token_hex(4)}).encode())


def read_life(store: ObjectStore, key: str) -> str:
    """A heartbeat as it lies in the store; empty if there is none."""
    try:
        return store.get(key).decode()
    except ObjectNotFound:
        return ""
