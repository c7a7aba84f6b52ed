"""The `populace` command."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from populace.storage.errors import InvalidInput, PopulaceError

if TYPE_CHECKING:  # torch and ray take seconds to import; `--help` needs neither
    from populace.population.client import Population

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keeps a population of personal models learning on one shared base.",
)
base_app = typer.Typer(no_args_is_help=True, help="The models that populations live on.")
app.add_typer(base_app, name="base")
store_app = typer.Typer(no_args_is_help=True, help="Where populations live.")
app.add_typer(store_app, name="store")
console = Console()

Store = Annotated[str, typer.Option(help="Where the population lives.", envvar="POPULACE_STORE")]
Name = Annotated[str | None, typer.Option(help="The population; needed when the store has several.")]


def main() -> None:
    """Entry point: errors that Populace raises on purpose are one line, not a traceback."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a base is always local; never ask a hub
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except PopulaceError as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)


@store_app.command("dev")
def store_dev(
    folder: Annotated[Path | None, typer.Option(help="Keep the data here; without it they go with the server.")] = None,
) -> None:
    """Run an S3 on this machine for development (SeaweedFS on loopback) until Ctrl-C."""
    from populace.storage.dev import DevStore
    from populace.storage.s3 import Bucket

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with DevStore(folder) as server:
        os.environ.update(server.environment)
        Bucket(server.url).ensure()
        print("# in the shell that uses it:")
        for name, value in server.environment.items():
            print(f"export {name}={value}")
        print(f"# store: {server.url}")
        print("# Ctrl-C stops it", flush=True)
        stop.wait()


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
) -> None:
    """Train a population until its experience is used up. Again on the same store continues."""
    from populace.configs.load import load_settings

    settings = load_settings(config, overrides or ())
    from populace.population.live import ConsoleView
    from populace.population.run import run_population

    with ConsoleView(console) as view:
        population, reported = run_population(settings, view)
    figures = population.status()
    console.print(
        f"{figures.name}: {figures.adapters} adapters, {figures.revisions} revisions, {figures.promoted} promoted, "
        f"{figures.rejected} rejected, {figures.pending_events} events pending"
    )
    if settings.report is not None and reported:
        from populace.population.report import print_report

        print_report(Path(settings.report), console)


@base_app.command()
def prepare(model: Annotated[str, typer.Argument(help="smollm2-moe, or a Hugging Face MoE folder.")]) -> None:
    """Make or register a base, so that configurations can name it."""
    with console.status("starting") as status:
        from populace.workers.prepare import prepare_base

        def show(stage: str) -> None:
            status.update(stage)
            if not console.is_terminal:
                console.print(stage)

        base = prepare_base(model, show)
    console.print(f"base [bold]{base.name}[/]  sha256 {base.digest[:16]}…  {base.folder}", soft_wrap=True)


@app.command()
def status(store: Store = "build/store", name: Name = None) -> None:
    """Counts over the whole population."""
    from dataclasses import asdict

    table = Table.grid(padding=(0, 2))
    for label, value in asdict(_open(store, name).status()).items():
        table.add_row(f"[bold]{label.replace('_', ' ')}[/]", str(value))
    console.print(table)


@app.command()
def revisions(user: str, store: Store = "build/store", name: Name = None) -> None:
    """A user's chain of revisions."""
    table = Table("revision", "parent", "events", "reward", "KL to base", "verdict", "")
    for info in _open(store, name).revisions(user):
        marks = [word for word, holds in (("serving", info.is_serving), ("tip", info.is_tip)) if holds]
        reward, kl = info.metrics.get("reward"), info.metrics.get("kl_to_base")
        table.add_row(
            str(info.revision),
            "" if info.parent is None else str(info.parent),
            str(info.num_events),
            "" if reward is None else f"{reward:.3f}",
            "" if kl is None else f"{kl:.4f}",
            ", ".join(info.verdicts),
            ", ".join(marks),
        )
    console.print(table)


@app.command()
def show(
    revision: Annotated[str, typer.Argument(help="USER@NUMBER")],
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """The manifest that committed a revision, as JSON."""
    user, _, number = revision.rpartition("@")
    if not user or not number.isdigit():
        raise InvalidInput(f"revision is {revision!r}; write it as USER@NUMBER, for example ada@3")
    console.print_json(json.dumps(_open(store, name).manifest(user, int(number))))


@app.command()
def sample(
    user: str,
    prompt: str,
    revision: Annotated[str, typer.Option(help="serving, tip, or a number.")] = "serving",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """An answer of a user's model."""
    from populace.configs.schema import RolloutSettings

    rollout = RolloutSettings(max_new_tokens=max_new_tokens, temperature=temperature)
    console.print(_open(store, name).sample(user, prompt, revision, rollout), highlight=False, markup=False)


@app.command()
def rollback(user: str, to: int, store: Store = "build/store", name: Name = None) -> None:
    """Move a user's tip and serving to an older revision."""
    _open(store, name).rollback(user, to)
    console.print(f"{user}: asked for revision {to}; a running controller obeys before its next wave")


@app.command()
def export(
    user: str,
    folder: Path,
    revision: Annotated[str, typer.Option(help="serving, tip, or a number.")] = "serving",
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Write a user's adapter as a PEFT folder."""
    from populace.population.export import export_peft

    number = export_peft(_open(store, name), user, folder, revision)
    console.print(f"{user}@{number} -> {folder}")


@app.command()
def verify(user: str, store: Store = "build/store", name: Name = None) -> None:
    """Check every blob of a user's revisions against the digests of their manifests."""
    console.print(f"{user}: {_open(store, name).verify(user)} blobs match their manifests")


def _open(store: str, name: str | None) -> Population:
    """The population in `store`, on the base that it was created on."""
    from populace.configs.schema import BaseSettings
    from populace.population.client import Population
    from populace.population.ledger import PopulationMeta
    from populace.storage.objects import open_store

    opened = open_store(store)
    if name is None:
        names = [key.split("/")[0] for key in opened.list("") if key.endswith("/population.json")]
        if len(names) != 1:
            raise InvalidInput(f"{opened.url} holds {len(names)} populations {names}; choose one with --name")
        name = names[0]
    meta = PopulationMeta.read(opened, name)
    return Population.open(opened, name=name, base=BaseSettings(model=meta.base))
