"""Commands that need no population: `populace base prepare`, `doctor`, `plan` and `simulate`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from populace.population.cli.console import console
from populace.storage.errors import InvalidInput

if TYPE_CHECKING:
    from populace.population.tools.capacity import Plan
    from populace.population.tools.simulate import SimulationReport

commands = typer.Typer()
base_commands = typer.Typer(no_args_is_help=True, help="The models that populations live on.")


@base_commands.command()
def prepare(
    model: Annotated[
        str,
        typer.Argument(help="smollm2-moe, a Hugging Face MoE folder, or random:PRESET[:LAYERS]."),
    ],
) -> None:
    """Make or register a base, so that configurations can name it."""
    with console.status("starting") as status:
        from populace.workers.base.registry import prepare_base

        def show(stage: str) -> None:
            status.update(stage)
            if not console.is_terminal:
                console.print(stage)

        base = prepare_base(model, show)
    console.print(
        f"base [bold]{base.name}[/]  sha256 {base.digest[:16]}…  {base.folder}", soft_wrap=True
    )


@commands.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML file of a run to be.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    store: Annotated[
        str | None, typer.Option(help="URL or path of a store to probe; else the configuration's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What of this machine a run would use, and why not the rest: GPU, numerics, store, Ray."""
    with console.status("looking"):
        from populace.configs.load import load_settings
        from populace.population.tools.doctor import State, examine

        config, changes = _split(config, overrides)
        settings = load_settings(config, changes)
        is_named = config is not None or any(change.startswith("store=") for change in changes)
        findings = list(examine(settings, store or (settings.store if is_named else None)))
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        colours = {State.GOOD: "green", State.NOTE: "yellow", State.BAD: "red"}
        table = Table.grid(padding=(0, 2))
        for finding in findings:
            colour = colours[finding.state]
            table.add_row(f"[{colour}]{finding.state}[/]", finding.name, escape(finding.text))
        console.print(table)
    if any(finding.state is State.BAD for finding in findings):
        raise typer.Exit(2)


@commands.command()
def plan(
    base: Annotated[
        str, typer.Option(help="A checkpoint's folder, or a preset: qwen3-30b-a3b, deepseek-v3, …")
    ],
    device: Annotated[str, typer.Option(help="a100, h100, h200, b200 or cpu.")] = "h100",
    devices: Annotated[int, typer.Option(help="Of one shard group.")] = 8,
    users: Annotated[float, typer.Option(help="1e6 is a million.")] = 1e6,
    updates_per_user_and_day: float = 1.0,
    rank: int = 8,
    expert_rank: int = 1,
    targets: Annotated[str, typer.Option(help="both, attention or experts.")] = "both",
    events_per_update: int = 4,
    samples_per_event: int = 8,
    prompt_tokens: int = 256,
    completion_tokens: int = 256,
    slots: Annotated[
        int, typer.Option(help="Adapters in device memory, over the whole group.")
    ] = 256,
    kept_revisions: int = 8,
    efficiency: Annotated[
        float, typer.Option(help="Share of the data sheet's rates that is reached.")
    ] = 0.4,
    store_bandwidth: Annotated[
        float, typer.Option(help="Bytes per second of the object store.")
    ] = 10e9,
    partitions: int = 64,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What a population would need: memory, time, bytes, requests, and what would limit it."""
    from populace.population.tools.capacity import plan as made
    from populace.population.tools.devices import Request, check
    from populace.workers.base.families import dims_of_config
    from populace.workers.base.footprint import config_of, tensors_of

    request = Request(
        device=device,
        devices=devices,
        users=users,
        updates_per_user_and_day=updates_per_user_and_day,
        rank=rank,
        expert_rank=expert_rank,
        targets=targets,
        events_per_update=events_per_update,
        samples_per_event=samples_per_event,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        slots=slots,
        kept_revisions=kept_revisions,
        efficiency=efficiency,
        store_bandwidth=store_bandwidth,
        partitions=partitions,
    )
    check(request)
    config = config_of(base)
    found = made(dims_of_config(config), tensors_of(config), request)
    if as_json:
        print(_as_json(found))
    else:
        _print_plan(found, f"{base} on {devices} x {device}, {users:,.0f} users")


def _as_json(found: Plan) -> str:
    body = dataclasses.asdict(found)
    for line in body["lines"]:  # JSON knows no infinity
        line["value"] = line["value"] if math.isfinite(line["value"]) else None
    return json.dumps(body, indent=1)


def _print_plan(found: Plan, title: str) -> None:
    from populace.population.tools.capacity import readable

    table, section = Table("", "figure", "value", "source", title=title), ""
    for line in found.lines:
        is_new, section = line.section != section, line.section
        if is_new:
            table.add_section()
        value = readable(line.value, line.unit)
        table.add_row(section if is_new else "", line.name, value, f"[dim]{line.source}[/]")
    console.print(table)
    fits = "[green]fits[/]" if found.fits else "[red]does not fit[/]"
    console.print(f"{fits}; bottleneck: {found.bottleneck}")
    console.print(f"what moves it: {found.knob}", soft_wrap=True)


@commands.command()
def simulate(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file; its `scheduler` section is tried out.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    users: Annotated[int, typer.Option(help="How many send events.")] = 10_000,
    rate: Annotated[float, typer.Option(help="Events per second of all users, on average.")] = 50.0,
    hours: Annotated[float, typer.Option(help="Simulated time.")] = 1.0,
    wave_s: Annotated[
        float, typer.Option(help="How long a wave takes; `populace plan` estimates it.")
    ] = 1.0,
    zipf: Annotated[float, typer.Option(help="How unequal users are; 0: all alike.")] = 1.0,
    day: Annotated[
        float, typer.Option(help="0 to 1: how far the rate swings over 24 hours.")
    ] = 0.0,
    burst_every_s: Annotated[float, typer.Option(help="Mean time between bursts; 0: none.")] = 0.0,
    burst_s: Annotated[float, typer.Option(help="How long a burst lasts.")] = 30.0,
    burst_factor: Annotated[float, typer.Option(help="What it multiplies the rate by.")] = 5.0,
    tokens: Annotated[int, typer.Option(help="Of an event.")] = 200,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Of the events, tenant by tenant, the default one first."),
    ] = None,
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Try scheduler settings on synthetic users before deploying them: waits, fairness,
    throughput."""
    from populace.configs.load import load_settings
    from populace.population.tools.simulate import Load
    from populace.population.tools.simulate import simulate as run

    settings = load_settings(*_split(config, overrides))
    shares = _shares(share, 1 + len(settings.scheduler.tenants))
    load = Load(
        users=users,
        events_per_s=rate,
        hours=hours,
        wave_s=wave_s,
        zipf=zipf,
        day_amplitude=day,
        burst_s=burst_s,
        burst_every_s=burst_every_s,
        burst_factor=burst_factor,
        tokens_per_event=tokens,
        rank=settings.adapter.rank,
        shares=shares,
        seed=seed,
    )
    report = run(load, settings)
    if as_json:
        figures = dataclasses.asdict(dataclasses.replace(report, waves=()))
        del figures["waves"]
        print(json.dumps(figures, indent=1))
    else:
        _print_simulation(report)


def _split(config: Path | None, overrides: list[str] | None) -> tuple[Path | None, list[str]]:
    """A configuration and overrides, where the first of them may stand in the other's place."""
    if config is not None and "=" in str(config) and not config.exists():
        return None, [str(config), *(overrides or ())]
    return config, overrides or []


def _shares(given: list[float] | None, num_tenants: int) -> tuple[float, ...]:
    """Equal ones where none are given."""
    if given and len(given) != num_tenants:
        raise InvalidInput(
            f"--share was given {len(given)} times; there are {num_tenants} tenants, the default "
            "included"
        )
    return tuple(given or (1.0,) * num_tenants)


def _print_simulation(report: SimulationReport) -> None:
    table = Table(
        "tenant", "weight", "arrived", "served", "waiting", "wait: median", "99 %", "longest"
    )
    for item in report.tenants:
        counts = (str(item.arrived), str(item.served), str(item.waiting))
        waits = (item.wait_median_s, item.wait_99_s, item.wait_longest_s)
        table.add_row(
            item.name, f"{item.weight:g}", *counts, *(f"{value:.1f} s" for value in waits)
        )
    console.print(table)
    console.print(
        f"{report.num_waves} waves of {report.adapters_per_wave:.1f} adapters; "
        f"{report.events_per_s:.1f} events/s; "
        f"fairness between tenants that always waited {report.fairness:.4f} (Jain); "
        f"{report.hot_share:.1%} of adapters were still hot",
        soft_wrap=True,
        highlight=False,
    )
