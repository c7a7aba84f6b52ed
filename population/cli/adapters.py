"""Commands about one user's adapter: its revisions, manifests, answers, rollbacks, pins, erasure,
export."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from populace.population.cli.console import Name, Store, console, open_population
from populace.storage.errors import InvalidInput

commands = typer.Typer()


@commands.command()
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


@commands.command()
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


@commands.command()
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
    console.print(
        open_population(store, name).sample(user, prompt, revision, rollout),
        highlight=False,
        markup=False,
    )


@commands.command()
def rollback(user: str, to: int, store: Store = "build/store", name: Name = None) -> None:
    """Move a user's tip and serving to an older revision."""
    done = open_population(store, name).rollback(user, to)
    _say_when(done, f"{user}: now at revision {to}", f"{user}: asked for revision {to}")


@commands.command()
def pin(
    user: str,
    revision: int,
    off: Annotated[
        bool, typer.Option("--off", help="Let the retention rule have it again.")
    ] = False,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Keep a revision whatever the retention rule says."""
    done = open_population(store, name).pin(user, revision, not off)
    _say_when(
        done,
        f"{user}@{revision} is {'under the rule again' if off else 'pinned'}",
        f"{user}@{revision}: asked",
    )


@commands.command()
def forget(
    user: str,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Make everything of a user unreadable for ever. This can't be undone."""
    if not yes:
        typer.confirm(
            f"Destroy the key of {user!r}: their experience and all their revisions?", abort=True
        )
    done = open_population(store, name).forget(user)
    _say_when(done, "forgotten; `populace repack` removes the bytes", "asked to forget")


@commands.command()
def export(
    user: str,
    folder: Path,
    revision: Annotated[str, typer.Option(help="serving, tip, or a number.")] = "serving",
    link_hours: Annotated[
        float | None,
        typer.Option(min=0.01, max=168, help="Also upload it (s3:// only) and print a link."),
    ] = None,
    store: Store = "build/store",
    name: Name = None,
) -> None:
    """Write a user's adapter as a PEFT folder."""
    from populace.population.tools.peft import export_peft, share_export

    population = open_population(store, name)
    if link_hours is not None and not population.store.url.startswith("s3:"):
        raise InvalidInput(
            f"store is {population.store.url}; links need s3://, a folder can be copied as it is"
        )
    number = export_peft(population, user, folder, revision)
    console.print(f"{user}@{number} -> {folder}", markup=False, highlight=False, soft_wrap=True)
    if link_hours is not None:
        link = share_export(population, user, number, folder, timedelta(hours=link_hours))
        print(link)


def _say_when(done: bool, now: str, later: str) -> None:
    text = now if done else f"{later}; the running controller obeys before its next wave"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
