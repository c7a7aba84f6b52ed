"""Commands about experience: `populace enqueue`, `parked` and `simulate`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from populace.population.cli.console import Name, Store, console, find_population, open_population

commands = typer.Typer()


@commands.command()
def enqueue(
    path: Annotated[
        Path,
        typer.Argument(help="FILE.jsonl, FILE.parquet, or a folder of Hugging Face `datasets`."),
    ],
    user: Annotated[str | None, typer.Option(help="Whose events rows without a user are.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A column to leave out; may be given again.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Check tasks against the rewards of this YAML file.")
    ] = None,
    rejects: Annotated[
        Path | None, typer.Option(help="Where bad rows go; FILE.rejects.jsonl by default.")
    ] = None,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Make a file's experience durable. Needs no running trainer; the same file again changes
    nothing."""
    from populace.configs.load import load_settings
    from populace.population.experience.files import enqueue_file, num_rows
    from populace.population.experience.producer import Producer

    rewards = None if config is None else load_settings(config).rewards.functions
    opened, meta = find_population(store, name)
    producer = Producer(opened, meta, rewards=rewards)
    rejects = rejects or path.with_name(f"{path.name}.rejects.jsonl")
    columns = (
        TextColumn("enqueueing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def tick(rows: int) -> None:
            progress.update(bar, completed=rows)

        bar = progress.add_task("enqueueing", total=num_rows(path) if path.exists() else None)
        report = enqueue_file(producer, path, rejects, user=user, ignore=ignore or (), tick=tick)
        progress.update(bar, completed=report.num_events + report.num_rejected)
    producer.close()
    console.print(
        f"{report.num_events} events of {report.num_users} users are durable in {meta.name}"
    )
    if report.num_rejected:
        text = f"{report.num_rejected} rows were rejected; line, reason and row of each: {rejects}"
        console.print(text, soft_wrap=True, markup=False)
        raise typer.Exit(1)


@commands.command()
def parked(
    user: Annotated[str | None, typer.Argument(help="One user; everybody without.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Events that were given up because they failed too often, and why."""
    found = open_population(store, name).parked(user)
    if as_json:
        print(json.dumps([dataclasses.asdict(item) for item in found], indent=1))
        return
    table = Table("user", "segment, row", "reason")
    for item in found:
        reason = item.reason + (f": {item.detail}" if item.detail else "")
        table.add_row(escape(item.user), f"{item.position[0]}, {item.position[1]}", escape(reason))
    console.print(table if found else "nothing is parked")
