"""Who owns which partition: controllers that share a population show life, and agree without
talking to each other.

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

from populace.storage.errors import ObjectNotFound, PopulaceError
from populace.storage.objects.contract import ObjectStore

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What was last seen at one place, and when by this process's monotonic clock it last
    changed."""

    body: str
    changed_s: float

    @property
    def owner(self) -> str:
        return str(json.loads(self.body)["owner"]) if self.body else ""

    @property
    def is_released(self) -> bool:
        return not self.body or bool(json.loads(self.body).get("released"))


class Heartbeat(threading.Thread):
    """Shows this process's life, and watches the others'."""

    def __init__(
        self, store: ObjectStore, population: str, num_partitions: int, name: str, interval_s: float
    ) -> None:
        super().__init__(daemon=True, name="populace-heartbeat")
        self._store, self._population, self.owner, self._interval_s = (
            store,
            population,
            name,
            interval_s,
        )
        self._num_partitions = num_partitions
        self._stopped = threading.Event()
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._owned: set[int] = set()
        self._controller: str | None = None
        self._on_stop: Callable[[], None] = lambda: None
        self.figures: Mapping[str, Any] = {}
        """What a controller shows of its work."""
        self.seen: dict[str, Life] = {}
        """Key -> life of the others."""

    def own(self, partition: int) -> None:
        """Show life for this partition from now on, at once: until then others see that nobody
        holds it."""
        with self._lock:
            self._owned.add(partition)
        with self._writing, contextlib.suppress(PopulaceError):  # then the next beat does
            self._put(
                owner_key(self._population, partition), {"owner": self.owner, "counter": "claimed"}
            )

    def drop(self, partition: int) -> None:
        """Show no life for a partition that somebody else has now."""
        with self._lock:
            self._owned.discard(partition)

    def disown(self, partition: int) -> None:
        """Say that this partition was released."""
        with self._writing:  # so that no sign of life comes after it
            self.drop(partition)
            self._put(
                owner_key(self._population, partition), {"owner": self.owner, "released": True}
            )

    def announce(self, controller: str, on_stop: Callable[[], None]) -> None:
        """Show life as a controller, also while it owns nothing; `on_stop` is called, again and
        again, when somebody asks it to stop."""
        self._controller, self._on_stop = controller, on_stop

    def living(self, within_s: float) -> set[str]:
        """Names of the processes that run other controllers and showed life lately."""
        folder = controllers_folder(self._population)
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
        """Who else holds a claimed partition and showed life lately. `claim`: whose it is, and when
        it was seen here; None: from before this process read the log."""
        with self._lock:
            life = self.seen.get(owner_key(self._population, partition))
        if life is None:
            return "somebody"  # nobody has looked yet
        if (
            claim is not None and life.owner != claim[0]
        ):  # a sign from before the claim; the claim itself is one too
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
                    self._look()
            except (
                Exception
            ) as error:  # a store that is away for a moment must not end the heartbeat
                logger.warning("heartbeat of %s failed: %s", self.owner, error)
            counter += 1
            if self._stopped.wait(self._interval_s):
                return

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def _beat(self, counter: int) -> None:
        with self._writing:
            with self._lock:
                keys = [owner_key(self._population, partition) for partition in sorted(self._owned)]
            for key in keys:
                self._put(key, {"owner": self.owner, "counter": counter})
            if self._controller is not None:
                body = {"owner": self.owner, "at": time.time(), "figures": self.figures}
                self._put(controller_key(self._population, self._controller), body)

    def _look(self) -> None:
        """Read what others show; a listing is good enough, nothing rests on it."""
        assert self._controller is not None
        own, request = (
            controller_key(self._population, self._controller),
            stop_key(self._population, self._controller),
        )
        there = list(self._store.list(controllers_folder(self._population)))
        keys = [key for key in there if key.endswith(".json") and key != own]
        with self._lock:
            keys += [
                owner_key(self._population, p)
                for p in range(self._num_partitions)
                if p not in self._owned
            ]
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
    try:
        return store.get(key).decode()
    except ObjectNotFound:
        return ""


def owner_key(population: str, partition: int) -> str:
    return f"{population}/owners/{partition}.json"


def controller_key(population: str, controller: str) -> str:
    return f"{controllers_folder(population)}/{controller}.json"


def stop_key(population: str, controller: str) -> str:
    """Where somebody asks a controller to stop."""
    return f"{controllers_folder(population)}/{controller}.stop"


def controllers_folder(population: str) -> str:
    return f"{population}/controllers"
