"""Observers of a run: the protocol, several at once, and one for machines.

They are told values, a `WaveReport` or a `RunState`, and never see the controller itself.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Self

from populace.population.waves.report import RunState, WaveReport
from populace.storage.errors import PopulaceError
from populace.storage.log.records import Tombstone, Verdict

logger = logging.getLogger(__name__)


class View:
    """An observer of one run, used as a context manager. All hooks do nothing here; override those
    you need."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stage(self, text: str) -> None:
        """Something is being done, or has happened, beside waves."""

    def wave(self, report: WaveReport, state: RunState) -> None:
        """A wave was trained."""

    def idle(self, state: RunState) -> None:
        """Nobody has anything to learn from; told twice a second."""

    def paused(self, error: PopulaceError | None) -> None:
        """The store is away or full, and why; None: it is back."""

    def decided(self, records: Sequence[Verdict | Tombstone]) -> None:
        """Verdicts and commands beside waves."""

    def restarted(self) -> None:
        """The shard group died and is started again."""


class Views(View):
    """Several observers as one, told by one thread at a time. Watching must not end what is
    watched: what a view raises is logged, once."""

    def __init__(self, *views: View) -> None:
        self._views, self._lock = views, threading.RLock()
        self._failed: set[View] = set()

    def stage(self, text: str) -> None:
        self._tell(lambda view: view.stage(text))

    def wave(self, report: WaveReport, state: RunState) -> None:
        self._tell(lambda view: view.wave(report, state))

    def idle(self, state: RunState) -> None:
        self._tell(lambda view: view.idle(state))

    def paused(self, error: PopulaceError | None) -> None:
        self._tell(lambda view: view.paused(error))

    def decided(self, records: Sequence[Verdict | Tombstone]) -> None:
        self._tell(lambda view: view.decided(records))

    def restarted(self) -> None:
        self._tell(lambda view: view.restarted())

    def _tell(self, say: Callable[[View], None]) -> None:
        with self._lock:
            for view in self._views:
                try:
                    say(view)
                except Exception:
                    if view not in self._failed:
                        self._failed.add(view)
                        logger.exception(
                            "%s failed; it may miss something from here on", type(view).__name__
                        )


class LogView(View):
    """One JSON object per line, for machines that collect logs."""

    def stage(self, text: str) -> None:
        self._write("stage", text=text)

    def wave(self, report: WaveReport, state: RunState) -> None:
        self._write(
            "wave",
            controller=state.controller,
            number=state.num_waves,
            wave=report.wave,
            adapters=report.num_adapters,
            revisions=report.num_revisions,
            trained=report.num_trained,
            settled=report.settled,
            tokens=report.num_tokens,
            reward=report.mean_reward,
            rollout_kl=report.rollout_kl,
            verdicts=Counter(record.decision for record in report.verdicts),
            pending=state.num_pending,
            seconds={phase: round(value, 3) for phase, value in report.seconds.items()},
        )

    def paused(self, error: PopulaceError | None) -> None:
        self._write(
            "back" if error is None else "paused",
            **({} if error is None else {"error": str(error)}),
        )

    def _write(self, event: str, **fields: Any) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        print(json.dumps({"at": at, "event": event, **fields}), flush=True)
