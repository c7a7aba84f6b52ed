"""A store that goes away in the middle of a run: the run says so, waits, and goes on by itself."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.controller import Controller
from populace.population.loop import Run, StopFlag
from populace.population.watching.views import View
from populace.population.waves.report import RunState, WaveReport
from populace.storage.errors import OutcomeUnknown, PopulaceError, StoreUnavailable
from populace.storage.objects.cloud import MemoryStore
from tests.support.accounting import account
from tests.support.loops import Loop, chat_of, engine_of
from tests.support.streams import experience


class Outage(MemoryStore):
    """Reads and writes fail while `is_down`."""

    def __init__(self) -> None:
        super().__init__()
        self.is_down = False

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in ("put", "create", "delete", "get", "read_into", "list", "head") and self.is_down:
            error = OutcomeUnknown if name in ("put", "create", "delete") else StoreUnavailable

            def fail(*_: object) -> None:
                raise error(f"{name}: connection refused")

            return fail
        return found


class Here:
    """The shard group of a run, in this process."""

    def surviving(self, controller: Controller, call: Callable[[], Any]) -> Any:
        return call()


class Recorder(View):
    """A view that remembers what it was shown, and does something after some waves."""

    def __init__(self, after_wave: Callable[[int], None]) -> None:
        self.pauses: list[str] = []
        """Why it paused; empty where it came back."""
        self._after_wave = after_wave

    def paused(self, error: PopulaceError | None) -> None:
        self.pauses.append("" if error is None else str(error))

    def wave(self, report: WaveReport, state: RunState) -> None:
        self._after_wave(state.num_waves)


@pytest.mark.parametrize("pipelined", [True, False])
def test_a_run_pauses_while_the_store_is_away_and_continues_by_itself(
    settings: Settings, pipelined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(settings.run, takeover_s=0.4, store_retry_s=0.3, pipelined=pipelined)
    scheduler = dataclasses.replace(settings.scheduler, slots=12)
    settings = dataclasses.replace(settings, run=run, scheduler=scheduler)
    # Retries of one append would take seconds.
    monkeypatch.setattr("populace.storage.log.owner.time", Quick())
    store = Outage()
    population = Population.create(store, settings)
    population.enqueue_many(experience(settings, num_users=14, num_tasks=6))
    population.ownership.join("main", run.takeover_s)
    loop = Loop(population, engine_of(population), chat_of(population))

    def after_wave(number: int) -> None:
        if number in (2, 5) and not store.is_down:
            store.is_down = True
            threading.Timer(1.0, lambda: setattr(store, "is_down", False)).start()

    view = Recorder(after_wave)
    Run(loop, population.ownership, Here(), view, StopFlag(view), lambda: True).until_done()  # type: ignore[arg-type]
    assert len(view.pauses) == 4 and all("connection refused" in text for text in view.pauses[::2])
    assert view.pauses[1::2] == ["", ""]
    assert account(population).is_exact()
    assert not loop.planner.suspects.users(), "an outage is nobody's fault"
    population.ownership.release()
    assert Population.open(store, settings).status().pending_events == 0


class Quick:
    """`time` for whoever should not wait."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / 100)


def test_a_run_that_is_stopped_while_the_store_is_away_ends_with_the_reason(
    settings: Settings,
) -> None:
    run = dataclasses.replace(settings.run, takeover_s=0.4, store_retry_s=0.2)
    settings = dataclasses.replace(settings, run=run)
    store = Outage()
    population = Population.create(store, settings)
    population.enqueue_many(experience(settings, num_users=4, num_tasks=6))
    population.ownership.join("main", run.takeover_s)
    loop = Loop(population, engine_of(population), chat_of(population))
    view = Recorder(lambda number: setattr(store, "is_down", True))
    stop = StopFlag(view)
    threading.Timer(12.0, stop.event.set).start()
    with pytest.raises((StoreUnavailable, OutcomeUnknown), match="connection refused"):
        Run(loop, population.ownership, Here(), view, stop, lambda: True).until_done()  # type: ignore[arg-type]
