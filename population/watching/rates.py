"""Live figures of a population's controllers, as `populace top` and the population page show
them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from populace.population.watching.beacon import SeenController

WINDOW_S = 60.0
"""Rates are over this much time, as soon as somebody has looked for as long."""

SILENT_S = 5.0

LONG_AGO_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerRates:
    """One controller as somebody who keeps looking sees it."""

    seen: SeenController
    is_silent: bool
    """Whether there was no heartbeat for a while."""
    per_s: Mapping[str, float]
    """Rate of each of its counts."""


class Watch:
    """Turns looks into rates. `look` wants to be called about once a second."""

    def __init__(self) -> None:
        self._history: dict[tuple[str, str], deque[tuple[float, Mapping[str, int]]]] = {}
        self._beats: dict[tuple[str, str], tuple[str, float]] = {}

    def look(
        self, controllers: Sequence[SeenController], now_s: float | None = None
    ) -> list[ControllerRates]:
        """What there is now, with rates since the oldest look in the window; of a first look, since
        the start."""
        now = time.monotonic() if now_s is None else now_s
        known = {(seen.name, seen.owner) for seen in controllers}
        for gone in self._history.keys() - known:
            del self._history[gone], self._beats[gone]
        return [self._rates(seen, now) for seen in controllers]

    def _rates(self, seen: SeenController, now: float) -> ControllerRates:
        key, figures = (seen.name, seen.owner), seen.figures
        beat, since = self._beats.get(key, ("", now))
        if beat != seen.beat:
            since = now
        self._beats[key] = (seen.beat, since)
        history = self._history.setdefault(key, deque())
        history.append((now, figures.counts))
        while len(history) > 1 and now - history[1][0] >= WINDOW_S:
            history.popleft()
        then, before = history[0]
        span = now - then
        if len(history) == 1 or span < 5.0:
            before, span = {}, figures.uptime_s
        per_s = (
            {name: (count - before.get(name, 0)) / span for name, count in figures.counts.items()}
            if span
            else {}
        )
        # Its own clock tells a first look about one that died long ago; clocks may differ a little.
        is_silent = now - since > SILENT_S or time.time() - seen.at_s > LONG_AGO_S
        return ControllerRates(seen=seen, is_silent=is_silent, per_s=per_s)


def top_table(population: str, controllers: Sequence[ControllerRates]) -> RenderableType:
    """One column per controller."""
    if not controllers:
        return f"nothing runs population {escape(population)}"
    table = Table(
        "",
        *(escape(item.seen.name) for item in controllers),
        title=f"populace top · {escape(population)}",
    )
    for label, cells in _rows(controllers):
        table.add_row(f"[bold]{label}[/]", *cells)
    owners = [
        f"[dim]{escape(item.seen.name)}: {escape(item.seen.owner)}[/]" for item in controllers
    ]
    return Group(table, *owners)


def _rows(controllers: Sequence[ControllerRates]) -> list[tuple[str, list[str]]]:
    def row(label: str, cell: Callable[[ControllerRates], object]) -> tuple[str, list[str]]:
        return label, [str(cell(item)) for item in controllers]

    def minute(name: str) -> Callable[[ControllerRates], str]:
        return lambda item: f"{60 * item.per_s.get(name, 0.0):.1f}"

    return [
        row("state", lambda item: "[red]silent[/]" if item.is_silent else item.seen.figures.state),
        row("partitions", lambda item: item.seen.figures.num_partitions),
        row("waves", lambda item: item.seen.figures.counts.get("waves", 0)),
        row("waves / min", minute("waves")),
        row("revisions / min", minute("committed")),
        row("promoted / min", minute("promote")),
        row("rejected / min", minute("reject")),
        row("rolled back / min", minute("rollback")),
        row("settled / min", minute("settled")),
        row("tokens / s", lambda item: f"{item.per_s.get('tokens', 0.0):.0f}"),
        row("waiting events", lambda item: item.seen.figures.num_pending),
        row("oldest wait", lambda item: f"{item.seen.figures.oldest_wait_s:.0f} s"),
        row("adapters", lambda item: tiers(item.seen.figures.residency)),
        row("last wave", lambda item: last_wave(item.seen.figures.last_wave)),
    ]


def tiers(residency: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {tier}" for tier, count in residency.items()) or "-"


def last_wave(wave: Mapping[str, object]) -> str:
    """`16 adapters, reward 0.41, 3.2 s: rollout 2.0, train 1.1`."""
    seconds = wave.get("seconds")
    if not isinstance(seconds, Mapping):
        return "-"
    reward = wave.get("reward")
    rewarded = f", reward {reward:.2f}" if isinstance(reward, float) else ""
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items() if value >= 0.05)
    total = f"{sum(seconds.values()):.1f} s"
    return f"{wave.get('adapters')} adapters{rewarded}, {': '.join(filter(None, (total, phases)))}"
