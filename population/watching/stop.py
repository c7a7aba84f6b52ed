"""Stopping runs from anywhere that sees their store."""

from __future__ import annotations

import getpass
import json
import socket
import time
from collections.abc import Callable, Mapping

from populace.population.watching.beacon import controllers_of
from populace.storage import paths
from populace.storage.errors import InvalidInput
from populace.storage.objects.contract import ObjectStore

DEAD_S = 30.0
"""A controller beats every second, and comes back some seconds after its store does; one that is
silent for this long isn't there any more."""

LOOK_S = 0.5


def stop_run(
    store: ObjectStore,
    population: str,
    *,
    controller: str | None = None,
    timeout_s: float = 600.0,
    tick: Callable[[Mapping[str, str]], None] = lambda outcomes: None,
) -> Mapping[str, str]:
    """Ask the run of a population, or only that `controller` of it, to end after its wave, and wait
    until it has.

    Returns controller -> `stopped`, `dead` (no heartbeat for `DEAD_S`; the next run of its name
    takes over) or `busy` (not yet, after `timeout_s`; it still knows that it shall).
    `InvalidInput` if nothing runs."""
    by, deadline = f"{getpass.getuser()}@{socket.gethostname()}", time.monotonic() + timeout_s
    there = {
        seen.name: seen
        for seen in controllers_of(store, population)
        if controller in (None, seen.name)
    }
    if not there:
        who = f"population {population!r}" if controller is None else f"controller {controller!r}"
        raise InvalidInput(f"nothing runs: no {who} has a heartbeat in {store.url}")
    asked: dict[str, str] = dict.fromkeys(there, "")
    """Controller -> the owner that a request names."""
    silent_since: dict[str, tuple[str, float]] = {}
    outcomes: dict[str, str] = {}
    while True:
        for name, seen in there.items():
            if (
                name in asked and asked[name] != seen.owner
            ):  # a run that lost its store comes back as another
                asked[name] = seen.owner
                store.put(
                    paths.stop_request(population, name),
                    json.dumps({"owner": seen.owner, "by": by}).encode(),
                )
        now = time.monotonic()
        for name in asked:
            if name not in there:
                outcomes[name] = "stopped"
                continue
            beat, since = silent_since.get(name, ("", now))
            if beat != there[name].beat:
                silent_since[name] = (there[name].beat, now)
                outcomes[name] = "busy"
            elif now - since >= DEAD_S:
                outcomes[name] = (
                    "dead"  # the request stays: it names its owner, nobody else obeys it
                )
        tick(outcomes)
        if "busy" not in outcomes.values() or now > deadline:
            return outcomes
        time.sleep(LOOK_S)
        there = {seen.name: seen for seen in controllers_of(store, population)}
