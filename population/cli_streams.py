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

from populace.population.console import Name, Store, console, find_population, open_population
from populace.storage.errors import InvalidInput

commands = typer.Typer()


@commands.command()
def enqueue(
    path: Annotated[Path, typer.Argument(help="FILE.jsonl, FILE.parquet, or a folder of Hugging Face `datasets`.")],
    user: Annotated[str | None, typer.Option(help="Whose events rows without a user are.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="A column to leave out; may be given again.")] = None,
    config: Annotated[Path | None, typer.Option(help="Check tasks against the rewards of this YAML file.")] = None,
    rejects: Annotated[Path | None, typer.Option(help="Where bad rows go; FILE.rejects.jsonl by default.")] = None,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Make a file's experience durable. Needs no running trainer; the same file again changes nothing."""
    from populace.configs.load import load_settings
    from populace.population.experience.files import enqueue_file, num_rows
    from populace.population.experience.producer import Producer

    rewards = None if config is None else load_settings(config).rewards.functions
    opened, meta = find_population(store, name)
    producer = Producer(opened, meta, rewards=rewards)
    rejects = rejects or path.with_name(f"{path.name}.rejects.jsonl")
    columns = (TextColumn("enqueueing"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def tick(rows: int) -> None:
            progress.update(bar, completed=rows)

        bar = progress.add_task("enqueueing", total=num_rows(path) if path.exists() else None)
        report = enqueue_file(producer, path, rejects, user=user, ignore=ignore or (), tick=tick)
        progress.update(bar, completed=report.num_events + report.num_rejected)
    producer.close()
    console.print(f"{report.num_events} events of {report.num_users} users are durable in {meta.name}")
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


@commands.command()
def simulate(
    config: Annotated[Path | None, typer.Argument(help="YAML file; its `scheduler` section is tried out.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    users: Annotated[int, typer.Option(help="How many send events.")] = 10_000,
    rate: Annotated[float, typer.Option(help="Events per second of all users, on average.")] = 50.0,
    hours: Annotated[float, typer.Option(help="Simulated time.")] = 1.0,
    wave_s: Annotated[float, typer.Option(help="How long a wave takes; `populace plan` estimates it.")] = 1.0,
    zipf: Annotated[float, typer.Option(help="How unequal users are; 0: all alike.")] = 1.0,
    day: Annotated[float, typer.Option(help="0 to 1: how far the rate swings over 24 hours.")] = 0.0,
    burst_every_s: Annotated[float, typer.Option(help="Mean time between bursts; 0: none.")] = 0.0,
    burst_s: Annotated[float, typer.Option(help="How long a burst lasts.")] = 30.0,
    burst_factor: Annotated[float, typer.Option(help="What it multiplies the rate by.")] = 5.0,
    tokens: Annotated[int, typer.Option(help="Of an event.")] = 200,
    share: Annotated[
        list[float] | None, typer.Option(help="Of the events, tenant by tenant, the default one first.")
    ] = None,
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Try scheduler settings on synthetic users before deploying them: waits, fairness, throughput."""
    from populace.configs.load import load_settings
    from populace.population.tools.simulate import Load
    from populace.population.tools.simulate import simulate as run
    from populace.population.waves.scheduler import policy_of

    settings = load_settings(config, overrides or ())
    num_tenants = 1 + len(settings.scheduler.tenants)
    shares = tuple(share or (1.0,) * num_tenants)
    if len(shares) != num_tenants:
        raise InvalidInput(
            f"--share was given {len(shares)} times; there are {num_tenants} tenants, the default included"
        )
    load = Load(
        users=users, events_per_s=rate, hours=hours, wave_s=wave_s, zipf=zipf, day_amplitude=day, burst_s=burst_s,
        burst_every_s=burst_every_s, burst_factor=burst_factor, tokens_per_event=tokens, rank=settings.adapter.rank,
        shares=shares, seed=seed,
    )  # fmt: skip
    report = run(load, settings, policy_of(settings.scheduler))
    if as_json:
        figures = dataclasses.asdict(dataclasses.replace(report, waves=()))
        print(json.dumps({key: value for key, value in figures.items() if key != "waves"}, indent=1))
        return
    table = Table("tenant", "weight", "arrived", "served", "waiting", "wait: median", "99 %", "longest")
    for item in report.tenants:
        waits = (f"{value:.1f} s" for value in (item.wait_median_s, item.wait_99_s, item.wait_longest_s))
        table.add_row(item.name, f"{item.weight:g}", str(item.arrived), str(item.served), str(item.waiting), *waits)
    console.print(table)
    console.print(
        f"{report.num_waves} waves of {report.adapters_per_wave:.1f} adapters; {report.events_per_s:.1f} events/s; "
        f"fairness between tenants that always waited {report.fairness:.4f} (Jain); {report.hot_share:.1%} of adapters "
        "were still hot",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
