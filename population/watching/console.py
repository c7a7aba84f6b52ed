"""What a person sees of a run: a live panel on a terminal, one line per wave elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from populace.configs.checks import is_follower
from populace.population.watching.views import View
from populace.population.waves.report import RunState, WaveReport
from populace.storage.errors import PopulaceError


class ConsoleView(View):
    """An observer that prints for people."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._totals: Counter[str] = Counter()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def stage(self, text: str) -> None:
        self._print(escape(text))

    def paused(self, error: PopulaceError | None) -> None:
        if error is None:
            self._print("the store is back; going on")
        else:
            self._print(f"[yellow]paused[/] until the store is back: {escape(str(error))}")

    def wave(self, report: WaveReport, state: RunState) -> None:
        seconds = sum(report.seconds.values())
        # The first controller of a run goes without.
        whose = f"{state.controller} " if is_follower(state.controller) else ""
        self._totals.update(
            waves=1,
            updates=report.num_revisions,
            tokens=report.num_tokens,
            milliseconds=round(1000 * seconds),
        )
        reward = "" if report.mean_reward is None else f"  reward {report.mean_reward:.3f}"
        route = "" if report.out_of_route is None else f"  out of route {report.out_of_route:.2%}"
        decisions = Counter(record.decision for record in report.verdicts)
        verdicts = "".join(f"  {count} {decision}" for decision, count in decisions.items())
        waiting = f"  {state.num_pending} events wait" if state.num_pending else ""
        self._print(
            f"{whose}wave {state.num_waves:3d}  {report.num_adapters} adapters  "
            f"{report.num_revisions} revisions"
            f"{reward}{route}  {report.num_tokens} tokens  {seconds:.1f} s{verdicts}{waiting}"
            f"  [dim]({_stages(report)})[/]"
        )
        if self._live is not None:
            self._live.update(self._panel(report, state), refresh=True)

    def _panel(self, report: WaveReport, state: RunState) -> Panel:
        totals, minutes = self._totals, max(self._totals["milliseconds"] / 60_000, 1e-9)
        table = Table.grid(padding=(0, 3))
        for label, value in (
            ("waves", f"{totals['waves']}"),
            ("users updated", f"{state.num_updated}"),
            ("revisions / min", f"{totals['updates'] / minutes:.1f}"),
            ("tokens / s", f"{totals['tokens'] / minutes / 60:.0f}"),
            ("mean reward", "-" if report.mean_reward is None else f"{report.mean_reward:.3f}"),
            ("pending events", f"{state.num_pending}"),
            ("adapters", f"{len(report.paging.hot)} hot, {state.num_adapters} in the store"),
            ("last wave", _stages(report)),
        ):
            table.add_row(f"[bold]{label}[/]", value)
        return Panel(table, title=f"populace · {state.population}", expand=False)

    def _print(self, markup: str) -> None:
        self._console.print(
            f"[dim]{time.monotonic() - self._started:6.0f} s[/]  {markup}", soft_wrap=True
        )


def _stages(report: WaveReport) -> str:
    return ", ".join(
        f"{stage} {value:.1f}" for stage, value in report.seconds.items() if value >= 0.05
    )
