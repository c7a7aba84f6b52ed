"""Commands about what lies in a store: `populace verify`, `repack`, `keys`, `catalog` and `store
dev`."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from populace.population.cli.console import Name, Store, console, find_population, open_population
from populace.storage.errors import InvalidInput

if TYPE_CHECKING:
    from populace.storage.identity import PopulationMeta
    from populace.storage.log.verify import Findings, LogPosition
    from populace.storage.objects.contract import ObjectStore

commands = typer.Typer()
store_commands = typer.Typer(no_args_is_help=True, help="Where populations live.")
key_commands = typer.Typer(no_args_is_help=True, help="Signing and master keys.")
catalog_commands = typer.Typer(no_args_is_help=True, help="The index of all adapters.")


@store_commands.command("dev")
def store_dev(
    folder: Annotated[
        Path | None, typer.Option(help="Keep the data here; without it they go with the server.")
    ] = None,
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


@commands.command()
def repack(
    last: Annotated[int, typer.Option(min=1, help="Keep every adapter's last revisions.")] = 2,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Drop old revisions and forgotten users from the packs. Kept: the last ones, tip, serving,
    promoted, pinned."""
    from populace.storage.catalog.repack import RetentionRule

    report = open_population(store, name).repack(RetentionRule(last=last))
    console.print(
        f"dropped {report.num_dropped} blobs, moved {report.num_moved}, deleted "
        f"{report.num_packs_deleted} packs"
    )


@commands.command()
def verify(
    user: Annotated[str | None, typer.Argument(help="One user; or --all.")] = None,
    everybody: Annotated[
        bool, typer.Option("--all", help="The whole population; needs no key.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    root_key: Annotated[
        str | None, typer.Option(help="Id of the root key that you know to be right.")
    ] = None,
    since: Annotated[
        Path | None, typer.Option(help="JSON of an earlier --all: finds a log that was cut off.")
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option(
            help="USER@NUMBER, or USER: train kept revisions again, alone, and compare the bytes."
        ),
    ] = None,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Walk every chain of revisions from 0: signatures, parents, digests of all bytes, no gap, no
    unexplained fork."""
    if replay is not None:
        if user is not None or everybody or since is not None or root_key is not None:
            raise InvalidInput(
                "--replay stands alone; run `populace verify` without it for signatures and digests"
            )
        _replay(replay, as_json, store, name)
        return
    if (user is None) != everybody:
        raise InvalidInput("name one user, or everybody with --all, or a revision with --replay")
    if since is not None and not everybody:
        raise InvalidInput("--since compares whole logs; use it with --all")
    if root_key is not None and len(root_key) < 16:
        raise InvalidInput(
            f"root key {root_key!r} is too short to pin anything; give at least 16 digits"
        )
    if user is not None:
        population = open_population(store, name)
        findings, meta = population.verify(user), population.meta
    else:
        opened, meta = find_population(store, name)
        findings = _verify_all(opened, meta, {} if since is None else _known_positions(since))
    if root_key is not None and not meta.root_key.keyid.startswith(root_key):
        findings.problems.append(
            f"population.json names the root key {meta.root_key.keyid}, not {root_key}"
        )
    _print_findings(findings, meta, as_json)
    if findings.problems:
        raise typer.Exit(1)


def _verify_all(
    store: ObjectStore, meta: PopulationMeta, known: Mapping[int, LogPosition]
) -> Findings:
    """Everybody's history; `known`: where each log was when it was verified before."""
    from populace.storage.log.verify import Findings, verify_partition

    findings = Findings()
    with console.status("verifying") as status:
        for partition in range(meta.partitions):
            verify_partition(
                store,
                meta.name,
                partition,
                meta.root_key,
                findings,
                known=known.get(partition),
                progress=lambda count: status.update(f"verifying: {count} blobs"),
            )
    return findings


def _print_findings(findings: Findings, meta: PopulationMeta, as_json: bool) -> None:
    if as_json:
        told = {"population": meta.name, "root_key": meta.root_key.keyid, **asdict(findings)}
        print(json.dumps(told, indent=1))
        return
    console.print(
        f"{meta.name}: {findings.num_records} records signed and chained, "
        f"{findings.num_revisions} revisions ({findings.num_not_kept} of them not kept), "
        f"{findings.num_blobs} blobs ({findings.num_bytes / 1e6:.1f} MB) match their manifests; "
        f"root key {meta.root_key.keyid[:16]}",
        soft_wrap=True,
    )
    for problem in findings.problems:
        console.print(f"[red]problem:[/] {escape(problem)}", soft_wrap=True, highlight=False)


def _replay(revision: str, as_json: bool, store: str, name: str | None) -> None:
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
            table.add_row(
                escape(f"{user}@{item.revision}"),
                f"[{colour}]{item.outcome}[/]",
                escape(item.detail),
            )
        console.print(table)
    if not all(item.is_same for item in found):
        raise typer.Exit(1)


@key_commands.command("rotate-signing")
def rotate_signing(store: Store = "build/store", name: Name = None) -> None:
    """Sign with a new key from now on; the old one vouches for it."""
    key = open_population(store, name).rotate_signing_key()
    console.print(
        f"records are signed by {key.keyid[:16]} from now on; its private half is in "
        f"{_key_folder()}",
        soft_wrap=True,
    )


@key_commands.command("rotate-master")
def rotate_master(store: Store = "build/store", name: Name = None) -> None:
    """Wrap every user's key with a new master key. The old one is needed until this is done, and
    not afterwards."""
    master = open_population(store, name).rotate_master_key()
    console.print(
        f"every key is wrapped by master key {master} now; it is in {_key_folder()}", soft_wrap=True
    )


@catalog_commands.command("export")
def export_catalog(folder: Path, store: Store = "build/store", name: Name = None) -> None:
    """Write the catalog as Parquet files that DuckDB and pandas read."""
    from populace.storage.catalog.parquet import export_catalog as write

    population = open_population(store, name)
    counts = write(population.ledger.catalog, folder)
    for table, count in counts.items():
        console.print(f"{folder / table}.parquet  {count} rows", soft_wrap=True)


def _known_positions(path: Path) -> dict[int, LogPosition]:
    from populace.storage.log.verify import positions_from_json

    try:
        return positions_from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"--since {path} can't be read: {error}") from None


def _key_folder() -> Path:
    from populace.storage.keys.keyring import Keyring

    return Keyring().folder
