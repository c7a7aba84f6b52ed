"""What a person sees while a population trains: a live panel on a terminal, one line per wave elsewhere."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from populace.population.controller import Controller
from populace.population.waves.report import WaveReport
from populace.storage.errors import PopulaceError
from populace.storage.log.records import Tombstone, Verdict

logger = logging.getLogger(__name__)


class View:
    """Whoever follows a run, as a context manager around it; what a subclass doesn't care about does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stage(self, text: str) -> None:
        """Something is being done, or has happened, beside waves."""

    def wave(self, report: WaveReport, controller: Controller) -> None:
        """A wave was trained."""

    def idle(self, controller: Controller) -> None:
        """Nobody has anything to learn from; told twice a second."""

    def paused(self, error: PopulaceError | None) -> None:
        """The store is away or full, and why; None: it is back."""

    def decided(self, records: Sequence[Verdict | Tombstone]) -> None:
        """Verdicts and commands beside waves."""

    def restarted(self) -> None:
        """The shard group died and is started again."""


class Views(View):
    """Several at once. Watching must not end what is watched: what a view raises is logged, once."""

    def __init__(self, *views: View) -> None:
        self._views = views
        self._failed: set[View] = set()

    def stage(self, text: str) -> None:
        self._tell(lambda view: view.stage(text))

    def wave(self, report: WaveReport, controller: Controller) -> None:
        self._tell(lambda view: view.wave(report, controller))

    def idle(self, controller: Controller) -> None:
        self._tell(lambda view: view.idle(controller))

    def paused(self, error: PopulaceError | None) -> None:
        self._tell(lambda view: view.paused(error))

    def decided(self, records: Sequence[Verdict | Tombstone]) -> None:
        self._tell(lambda view: view.decided(records))

    def restarted(self) -> None:
        self._tell(lambda view: view.restarted())

    def _tell(self, say: Callable[[View], None]) -> None:
        for view in self._views:
            try:
                say(view)
            except Exception:
                if view not in self._failed:
                    self._failed.add(view)
                    logger.exception("%s failed; it may miss something from here on", type(view).__name__)


class LogView(View):
    """One JSON object per line, for machines that collect logs."""

    def stage(self, text: str) -> None:
        self._write("stage", text=text)

    def wave(self, report: WaveReport, controller: Controller) -> None:
        self._write(
            "wave",
            number=controller.num_waves,
            wave=report.wave,
            adapters=report.num_adapters,
            revisions=report.num_revisions,
            trained=report.num_trained,
            settled=report.settled,
            tokens=report.num_tokens,
            reward=report.mean_reward,
            rollout_kl=report.rollout_kl,
            verdicts=Counter(record.decision for record in report.verdicts),
            pending=controller.ledger.pending.num_pending(),
            seconds={phase: round(value, 3) for phase, value in report.seconds.items()},
        )

    def paused(self, error: PopulaceError | None) -> None:
        self._write("back" if error is None else "paused", **({} if error is None else {"error": str(error)}))

    def _write(self, event: str, **fields: Any) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        print(json.dumps({"at": at, "event": event, **fields}), flush=True)


class ConsoleView(View):
    """For people."""

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

    def wave(self, report: WaveReport, controller: Controller) -> None:
        seconds = sum(report.seconds.values())
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
        num_waiting = controller.ledger.pending.num_pending()
        waiting = f"  {num_waiting} events wait" if num_waiting else ""
        self._print(
            f"wave {controller.num_waves:3d}  {report.num_adapters} adapters  {report.num_revisions} revisions"
            f"{reward}{route}  {report.num_tokens} tokens  {seconds:.1f} s{verdicts}{waiting}"
            f"  [dim]({_stages(report)})[/]"
        )
        if self._live is not None:
            self._live.update(self._panel(report, controller), refresh=True)

    def _panel(self, report: WaveReport, controller: Controller) -> Panel:
        totals, minutes = self._totals, max(self._totals["milliseconds"] / 60_000, 1e-9)
        catalog = controller.ledger.catalog
        table = Table.grid(padding=(0, 3))
        for label, value in (
            ("waves", f"{totals['waves']}"),
            ("users updated", f"{catalog.num_updated()}"),
            ("revisions / min", f"{totals['updates'] / minutes:.1f}"),
            ("tokens / s", f"{totals['tokens'] / minutes / 60:.0f}"),
            ("mean reward", "-" if report.mean_reward is None else f"{report.mean_reward:.3f}"),
            ("pending events", f"{controller.ledger.pending.num_pending()}"),
            ("adapters", f"{len(report.paging.hot)} hot, {len(catalog)} in the store"),
            ("last wave", _stages(report)),
        ):
            table.add_row(f"[bold]{label}[/]", value)
        return Panel(table, title=f"populace · {controller.ledger.meta.name}", expand=False)

    def _print(self, markup: str) -> None:
        self._console.print(f"[dim]{time.monotonic() - self._started:6.0f} s[/]  {markup}", soft_wrap=True)


def _stages(report: WaveReport) -> str:
    return ", ".join(f"{stage} {value:.1f}" for stage, value in report.seconds.items() if value >= 0.05)
