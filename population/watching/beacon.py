"""What a controller shows of its work with every heartbeat: whoever sees the store sees the run.

`populace top` and the population page read it; nothing rests on it.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from populace.population.watching.views import View
from populace.population.waves.report import RunState, WaveReport, change_of
from populace.storage import paths
from populace.storage.errors import ObjectNotFound, PopulaceError
from populace.storage.log.records import Tombstone, Verdict
from populace.storage.objects.contract import ObjectStore

logger = logging.getLogger(__name__)

MAX_HOT = 256
"""Hot adapters that are named."""

NAME_DIGITS = 12
"""Digits of their pseudonyms that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerFigures:
    """One controller now. Counts are since it started."""

    state: str = "starting"
    """starting, training, idle or paused."""
    uptime_s: float = 0.0
    num_partitions: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    """waves, tokens, trained, settled, and the decisions: committed, promote, reject, rollback,
    …"""
    num_pending: int = 0
    oldest_wait_s: float = 0.0
    residency: Mapping[str, int] = field(default_factory=dict)
    """Tier -> adapters, as in `populace_adapters`."""
    hot: tuple[str, ...] = ()
    """The first digits of the pseudonyms of adapters in slots, `MAX_HOT` at most."""
    last_wave: Mapping[str, Any] = field(default_factory=dict)
    """adapters, revisions, reward, tokens, seconds (by phase)."""


class Beacon(View):
    """Follows a run, and hands figures to whatever shows them."""

    def __init__(self, show: Callable[[Mapping[str, Any]], None]) -> None:
        self._show, self._started, self._counts = show, time.monotonic(), Counter[str]()
        self._last: Mapping[str, Any] = {}
        self._residency: Mapping[str, int] = {}
        self._hot: tuple[str, ...] = ()

    def wave(self, report: WaveReport, state: RunState) -> None:
        self._counts.update(
            waves=1, tokens=report.num_tokens, trained=report.num_trained,
            settled=sum(report.settled.values()),
            committed=report.num_revisions,
        )  # fmt: skip
        self._count([*report.verdicts, *report.answered])
        paging = report.paging
        self._residency = {"hot": len(paging.hot), "warm": paging.num_warm, "near": paging.num_near}
        self._hot = tuple(pseudonym[:NAME_DIGITS] for pseudonym in paging.hot[:MAX_HOT])
        self._last = {
            "adapters": report.num_adapters,
            "revisions": report.num_revisions,
            "reward": report.mean_reward,
            "tokens": report.num_tokens,
            "seconds": {phase: round(seconds, 3) for phase, seconds in report.seconds.items()},
        }
        self._publish("training", state)

    def idle(self, state: RunState) -> None:
        self._publish("idle", state)

    def decided(self, records: Sequence[Verdict | Tombstone]) -> None:
        self._count(records)

    def paused(self, error: PopulaceError | None) -> None:
        """Nobody sees this while the store is away, but a store that is full can still be read."""
        word = "starting" if error is None else "paused"
        self._show(asdict(ControllerFigures(state=word, counts=dict(self._counts))))

    def _count(self, records: Sequence[Verdict | Tombstone]) -> None:
        self._counts.update(change_of(record) for record in records)

    def _publish(self, word: str, state: RunState) -> None:
        figures = ControllerFigures(
            state=word,
            uptime_s=round(time.monotonic() - self._started, 1),
            num_partitions=state.num_partitions,
            counts=dict(self._counts),
            num_pending=state.num_pending,
            oldest_wait_s=round(state.oldest_wait_s, 1),
            residency={**self._residency, "store": state.num_adapters},
            hot=self._hot,
            last_wave=self._last,
        )
        self._show(asdict(figures))


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenController:
    """What stands in the store about one controller."""

    name: str
    owner: str
    """Host, process and a word of its own."""
    beat: str
    """Changes with every heartbeat."""
    at_s: float
    """When that was, by the controller's own clock: seconds since 1970."""
    figures: ControllerFigures


def controllers_of(store: ObjectStore, population: str) -> list[SeenController]:
    """Every controller whose heartbeat is in the store: it runs, or died without a word."""
    seen = []
    for key in store.list(paths.controller_folder(population)):
        if not key.endswith(".json"):
            continue
        try:
            body = json.loads(store.get(key))
            seen.append(_seen(key.rpartition("/")[2].removesuffix(".json"), body))
        except ObjectNotFound:  # it ended meanwhile
            continue
        except (
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # of one controller; the others are shown
            logger.warning("%s is no heartbeat: %r", key, error)
    return seen


def _seen(name: str, body: Mapping[str, Any]) -> SeenController:
    known = {item.name for item in fields(ControllerFigures)}
    figures = {name: value for name, value in body.get("figures", {}).items() if name in known}
    figures["hot"] = tuple(figures.get("hot", ()))
    return SeenController(
        name=name,
        owner=body["owner"],
        beat=body["nonce"],
        at_s=body["at"],
        figures=ControllerFigures(**figures),
    )
