"""Commands about running populations: `populace stop`, `top` and `page`."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from populace.population.cli.console import (
    TEMPORARY,
    Name,
    Store,
    console,
    find_population,
    open_population,
)

commands = typer.Typer()


@commands.command()
def stop(
    name: Annotated[
        str | None, typer.Argument(help="The population; needed when the store has several.")
    ] = None,
    controller: Annotated[
        str | None, typer.Option(help="Only this one of several that share it.")
    ] = None,
    timeout_s: Annotated[
        float, typer.Option(min=0.0, help="How long to wait for the wave to end.")
    ] = 600.0,
    store: Store = "build/store",
) -> None:
    """End a run after its wave, from any machine that sees the store. Running it again
    continues."""
    from populace.population.watching.stop import stop_run

    opened, meta = find_population(store, name)
    with console.status("asked; waiting for the wave to end") as status:

        def tick(outcomes: Mapping[str, str]) -> None:
            status.update(", ".join(f"{each}: {outcome}" for each, outcome in outcomes.items()))

        outcomes = stop_run(
            opened, meta.name, controller=controller, timeout_s=timeout_s, tick=tick
        )
    texts = {
        "stopped": "stopped",
        "dead": "has no heartbeat; the next run takes its partitions over",
        "busy": f"is still busy after {timeout_s:g} s; it stops after its wave",
    }
    for each, outcome in outcomes.items():
        console.print(f"{each}: {texts[outcome]}", markup=False, highlight=False)
    if "busy" in outcomes.values():
        raise typer.Exit(TEMPORARY)


@commands.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines; once.")] = False,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Live figures of a population's controllers, until Ctrl-C. Needs the store alone, no key and
    no Ray."""
    from rich.live import Live

    from populace.population.watching.beacon import controllers_of
    from populace.population.watching.rates import Watch, top_table

    opened, meta = find_population(store, name)
    if as_json:
        json.dump(
            [asdict(seen) for seen in controllers_of(opened, meta.name)], sys.stdout, indent=1
        )
        print()
        return
    watch = Watch()
    if once or not console.is_terminal:
        console.print(top_table(meta.name, watch.look(controllers_of(opened, meta.name))))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(
                top_table(meta.name, watch.look(controllers_of(opened, meta.name))), refresh=True
            )
            time.sleep(1.0)


@commands.command()
def page(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8270,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name that browsers call it by.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="A run's report folder, for the specialisation matrix.")
    ] = None,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Serve the population page until Ctrl-C, with or without a run. POPULACE_PAGE_TOKEN allows
    actions."""
    from populace.population.page.serve import serving_page
    from populace.population.run import start_ray

    population, stopped = open_population(store, name), threading.Event()
    start_ray()
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which sets its own
        signal.signal(number, lambda *_: stopped.set())
    hosts = tuple(allow_host or ())
    with serving_page(
        population, host, port, hosts, "" if report is None else str(report)
    ) as address:
        print(f"{address} shows {population.meta.name}; Ctrl-C ends it", flush=True)
        stopped.wait()
