"""The `populace` command: the main group, and the command that runs a population.

What is slow to import is imported where it is used: `--help` and a mistyped option must not wait
for torch and Ray.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from populace.population.cli import adapters, experience, runs, sizing, store
from populace.population.cli.console import TEMPORARY, Name, Store, console, open_population
from populace.storage.errors import InvalidInput, PopulaceError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keeps a population of personal models learning on one shared base.",
)
for module in (adapters, experience, runs, sizing, store):
    app.add_typer(module.commands)
app.add_typer(sizing.base_commands, name="base")
app.add_typer(store.store_commands, name="store")
app.add_typer(store.key_commands, name="keys")
app.add_typer(store.catalog_commands, name="catalog")


def main() -> None:
    """Entry point: errors that Populace raises on purpose are one line, not a traceback. The exit
    code is 2 where something has to change first, `TEMPORARY` where the same may work later, 1 for
    everything unforeseen."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a base is always local; never ask a hub
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except PopulaceError as error:
        Console(stderr=True).print(
            f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False
        )
        sys.exit(TEMPORARY if error.is_temporary else 2)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    log: Annotated[
        str, typer.Option(help="text, or json: one object a line, for machines.")
    ] = "text",
) -> None:
    """Train a population until its experience is used up. Again on the same store continues."""
    if log not in ("text", "json"):
        raise InvalidInput(f"--log is {log!r}; use text or json")
    from populace.configs.load import load_settings

    settings = load_settings(config, overrides or ())
    from populace.population.run import run_population
    from populace.population.watching.console import ConsoleView
    from populace.population.watching.views import LogView

    if log == "json":
        run_population(settings, LogView())
        return
    with ConsoleView(console) as view:
        population, reported = run_population(settings, view)
    figures = population.status()
    console.print(
        f"{figures.name}: {figures.adapters} adapters, {figures.revisions} revisions, "
        f"{figures.promoted} promoted, "
        f"{figures.rejected} rejected, {figures.pending_events} events pending"
    )
    if settings.report is not None and reported:
        from populace.population.tools.report import print_report

        print_report(Path(settings.report), console)


@app.command()
def status(store: Store = "build/store", name: Name = None) -> None:
    """Counts over the whole population."""
    from dataclasses import asdict

    table = Table.grid(padding=(0, 2))
    for label, value in asdict(open_population(store, name).status()).items():
        table.add_row(f"[bold]{label.replace('_', ' ')}[/]", str(value))
    console.print(table)
