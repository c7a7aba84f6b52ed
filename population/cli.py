"""The `populace` command."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from populace.population.cli_operate import commands as operate_commands
from populace.population.cli_streams import commands as stream_commands
from populace.population.console import TEMPORARY, Name, Store, console, find_population, open_population
from populace.storage.errors import InvalidInput, PopulaceError

if TYPE_CHECKING:
    from populace.storage.log.verify import Position

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
keys_app = typer.Typer(no_args_is_help=True, help="Signing and master keys.")
app.add_typer(keys_app, name="keys")
catalog_app = typer.Typer(no_args_is_help=True, help="The index of all adapters.")
app.add_typer(catalog_app, name="catalog")
app.add_typer(stream_commands)
app.add_typer(operate_commands)


def main() -> None:
    """Entry point: errors that Populace raises on purpose are one line, not a traceback. The exit code is 2 where
    something has to change first, `TEMPORARY` where the same may work later, 1 for everything unforeseen."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a base is always local; never ask a hub
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except PopulaceError as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(TEMPORARY if error.is_temporary else 2)


@store_app.command("dev")
def store_dev(
    folder: Annotated[Path | None, typer.Option(help="Keep the data here; without it they go with the server.")] = None,
) -> None:
    """Run an S3 on this machine for development (SeaweedFS on loopback) until Ctrl-C."""
    from populace.storage.objects.bucket import Bucket
    from populace.storage.objects.dev import DevStore

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
    log: Annotated[str, typer.Option(help="text, or json: one object a line, for machines.")] = "text",
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
        f"{figures.name}: {figures.adapters} adapters, {figures.revisions} revisions, {figures.promoted} promoted, "
        f"{figures.rejected} rejected, {figures.pending_events} events pending"
    )
    if settings.report is not None and reported:
        from populace.population.tools.report import print_report

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
    for label, value in asdict(open_population(store, name).status()).items():
        table.add_row(f"[bold]{label.replace('_', ' ')}[/]", str(value))
    console.print(table)


@app.command()
def revisions(user: str, store: Store = "build/store", name: Name = None) -> None:
    """A user's chain of revisions."""
    table = Table("revision", "parent", "age", "events", "reward", "KL to base", "verdict", "")
    for info in open_population(store, name).revisions(user):
        states = (("serving", info.is_serving), ("tip", info.is_tip), ("dropped", not info.is_kept))
        marks = [word for word, holds in states if holds]
        reward, kl = info.metrics.get("reward"), info.metrics.get("kl_to_base")
        table.add_row(
            str(info.revision),
            "" if info.parent is None else str(info.parent),
            "" if info.committed_at is None else _age(time.time() - info.committed_at),
            str(info.num_events),
            "" if reward is None else f"{reward:.3f}",
            "" if kl is None else f"{kl:.4f}",
            ", ".join(info.verdicts),
            ", ".join(marks),
        )
    console.print(table)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


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
    console.print_json(json.dumps(open_population(store, name).manifest(user, int(number))))


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
    console.print(open_population(store, name).sample(user, prompt, revision, rollout), highlight=False, markup=False)


@app.command()
def plan(
    base: Annotated[str, typer.Option(help="A checkpoint's folder, or qwen3-30b-a3b, deepseek-v3, kimi-k2.")],
    device: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h100",
    devices: Annotated[int, typer.Option(help="Of one shard group.")] = 8,
    users: Annotated[float, typer.Option(help="1e6 is a million.")] = 1e6,
    updates_per_user_and_day: float = 1.0,
    rank: int = 8,
    expert_rank: int = 1,
    events_per_update: int = 4,
    samples_per_event: int = 8,
    prompt_tokens: int = 256,
    completion_tokens: int = 256,
    slots: Annotated[int, typer.Option(help="Adapters in device memory, over the whole group.")] = 256,
    kept_revisions: int = 8,
    efficiency: Annotated[float, typer.Option(help="Share of the data sheet's rates that is reached.")] = 0.4,
    store_bandwidth: Annotated[float, typer.Option(help="Bytes per second of the object store.")] = 10e9,
    partitions: int = 64,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What a population would need: memory, time, bytes, requests, and what would limit it."""
    from populace.population.tools import capacity as planner
    from populace.workers.families import dims_of_config
    from populace.workers.footprint import config_of, tensors_of

    request = planner.Request(
        device=device, devices=devices, users=users, updates_per_user_and_day=updates_per_user_and_day, rank=rank,
        expert_rank=expert_rank, events_per_update=events_per_update, samples_per_event=samples_per_event,
        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, slots=slots, kept_revisions=kept_revisions,
        efficiency=efficiency, store_bandwidth=store_bandwidth, partitions=partitions,
    )  # fmt: skip
    planner.check(request)
    config = config_of(base)
    found = planner.plan(dims_of_config(config), tensors_of(config), request)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
        return
    table = Table("", "figure", "value", "source", title=f"{base} on {devices} x {device}, {users:,.0f} users")
    section = ""
    for line in found.lines:
        is_new, section = line.section != section, line.section
        if is_new:
            table.add_section()
        value = planner.readable(line.value, line.unit)
        table.add_row(section if is_new else "", line.name, value, f"[dim]{line.source}[/]")
    console.print(table)
    console.print(f"{'[green]fits[/]' if found.fits else '[red]does not fit[/]'}; bottleneck: {found.bottleneck}")
    console.print(f"what moves it: {found.knob}", soft_wrap=True)


@app.command()
def rollback(user: str, to: int, store: Store = "build/store", name: Name = None) -> None:
    """Move a user's tip and serving to an older revision."""
    done = open_population(store, name).rollback(user, to)
    _say_when(done, f"{user}: now at revision {to}", f"{user}: asked for revision {to}")


@app.command()
def pin(
    user: str,
    revision: int,
    off: Annotated[bool, typer.Option("--off", help="Let the retention rule have it again.")] = False,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Keep a revision whatever the retention rule says."""
    done = open_population(store, name).pin(user, revision, not off)
    _say_when(done, f"{user}@{revision} is {'under the rule again' if off else 'pinned'}", f"{user}@{revision}: asked")


@app.command()
def forget(
    user: str,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Make everything of a user unreadable for ever. This can't be undone."""
    if not yes:
        typer.confirm(f"Destroy the key of {user!r}: their experience and all their revisions?", abort=True)
    done = open_population(store, name).forget(user)
    _say_when(done, "forgotten; `populace repack` removes the bytes", "asked to forget")


@app.command()
def repack(
    last: Annotated[int, typer.Option(min=1, help="Keep every adapter's last revisions.")] = 2,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Drop old revisions and forgotten users from the packs. Kept: the last ones, tip, serving, promoted, pinned."""
    from populace.storage.catalog.repack import RetentionRule

    report = open_population(store, name).repack(RetentionRule(last=last))
    console.print(
        f"dropped {report.num_dropped} blobs, moved {report.num_moved}, deleted {report.num_packs_deleted} packs"
    )


@app.command()
def export(
    user: str,
    folder: Path,
    revision: Annotated[str, typer.Option(help="serving, tip, or a number.")] = "serving",
    link_hours: Annotated[
        float | None, typer.Option(min=0.01, max=168, help="Also upload it (s3:// only) and print a link.")
    ] = None,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Write a user's adapter as a PEFT folder."""
    from populace.population.tools.peft import export_peft, share_export

    population = open_population(store, name)
    if link_hours is not None and not population.store.url.startswith("s3:"):
        raise InvalidInput(f"store is {population.store.url}; links need s3://, a folder can be copied as it is")
    number = export_peft(population, user, folder, revision)
    console.print(f"{user}@{number} -> {folder}", markup=False, highlight=False, soft_wrap=True)
    if link_hours is not None:
        link = share_export(population, user, number, folder, timedelta(hours=link_hours))
        print(link)


@app.command()
def verify(
    user: Annotated[str | None, typer.Argument(help="One user; or --all.")] = None,
    everybody: Annotated[bool, typer.Option("--all", help="The whole population; needs no key.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    root_key: Annotated[str | None, typer.Option(help="Id of the root key that you know to be right.")] = None,
    since: Annotated[Path | None, typer.Option(help="JSON of an earlier --all: finds a log that was cut off.")] = None,
    replay: Annotated[
        str | None, typer.Option(help="USER@NUMBER, or USER: train kept revisions again, alone, and compare the bytes.")
    ] = None,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Walk every chain of revisions from 0: signatures, parents, digests of all bytes, no gap, no unexplained fork."""
    from dataclasses import asdict

    from populace.storage.log.verify import Findings, verify_partition

    if replay is not None:
        if user is not None or everybody or since is not None or root_key is not None:
            raise InvalidInput("--replay stands alone; run `populace verify` without it for signatures and digests")
        _replay(replay, as_json, store, name)
        return
    if (user is None) != everybody:
        raise InvalidInput("name one user, or everybody with --all, or a revision with --replay")
    if since is not None and not everybody:
        raise InvalidInput("--since compares whole logs; use it with --all")
    if root_key is not None and len(root_key) < 16:
        raise InvalidInput(f"root key {root_key!r} is too short to pin anything; give at least 16 digits")
    if user is not None:
        population = open_population(store, name)
        findings, meta = population.verify(user), population.meta
    else:
        opened, meta = find_population(store, name)
        known = _known_positions(since) if since is not None else {}
        findings = Findings()
        with console.status("verifying") as status:
            for partition in range(meta.partitions):
                verify_partition(
                    opened, meta.name, partition, meta.root_key, findings, known=known.get(partition),
                    progress=lambda count: status.update(f"verifying: {count} blobs"),
                )  # fmt: skip
    if root_key is not None and not meta.root_key.keyid.startswith(root_key):
        findings.problems.append(f"population.json names the root key {meta.root_key.keyid}, not {root_key}")
    if as_json:
        print(json.dumps({"population": meta.name, "root_key": meta.root_key.keyid, **asdict(findings)}, indent=1))
    else:
        console.print(
            f"{meta.name}: {findings.num_records} records signed and chained, {findings.num_revisions} revisions "
            f"({findings.num_not_kept} of them not kept), {findings.num_blobs} blobs "
            f"({findings.num_bytes / 1e6:.1f} MB) match their manifests; root key {meta.root_key.keyid[:16]}",
            soft_wrap=True,
        )
        for problem in findings.problems:
            console.print(f"[red]problem:[/] {escape(problem)}", soft_wrap=True, highlight=False)
    if findings.problems:
        raise typer.Exit(1)


def _replay(revision: str, as_json: bool, store: str, name: str | None) -> None:
    from dataclasses import asdict

    from populace.population.tools.replay import replay

    user, at, number = revision.rpartition("@")
    if not at or not number.isdecimal():
        user, number = revision, ""
    with console.status("training again"):
        found = replay(open_population(store, name), user, int(number) if number else None)
    if as_json:
        print(json.dumps([asdict(item) for item in found], indent=1))
    else:
        table = Table("revision", "outcome", "")
        for item in found:
            colour = "green" if item.is_same else "red" if item.outcome == "DIFFERENT" else "yellow"
            table.add_row(escape(f"{user}@{item.revision}"), f"[{colour}]{item.outcome}[/]", escape(item.detail))
        console.print(table)
    if not all(item.is_same for item in found):
        raise typer.Exit(1)


@keys_app.command("rotate-signing")
def rotate_signing(store: Store = "build/store", name: Name = None) -> None:
    """Sign with a new key from now on; the old one vouches for it."""
    key = open_population(store, name).rotate_signing_key()
    console.print(
        f"records are signed by {key.keyid[:16]} from now on; its private half is in {_key_folder()}", soft_wrap=True
    )


@keys_app.command("rotate-master")
def rotate_master(store: Store = "build/store", name: Name = None) -> None:
    """Wrap every user's key with a new master key. The old one is needed until this is done, and not afterwards."""
    master = open_population(store, name).rotate_master_key()
    console.print(f"every key is wrapped by master key {master} now; it is in {_key_folder()}", soft_wrap=True)


@catalog_app.command("export")
def export_catalog(folder: Path, store: Store = "build/store", name: Name = None) -> None:
    """Write the catalog as Parquet files that DuckDB and pandas read."""
    from populace.storage.catalog.parquet import export_catalog as write

    population = open_population(store, name)
    counts = write(population.ledger.catalog, folder)
    for table, count in counts.items():
        console.print(f"{folder / table}.parquet  {count} rows", soft_wrap=True)


def _known_positions(path: Path) -> dict[int, Position]:
    from populace.storage.log.verify import positions_from_json

    try:
        return positions_from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"--since {path} can't be read: {error}") from None


def _say_when(done: bool, now: str, later: str) -> None:
    text = now if done else f"{later}; the running controller obeys before its next wave"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _key_folder() -> Path:
    from populace.storage.keys.keyring import Keyring

    return Keyring().folder
