"""What the commands share: the console, their common options, and how they open a population."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from populace.storage.errors import InvalidInput

if TYPE_CHECKING:
    from populace.population.client import Population
    from populace.storage.identity import PopulationMeta
    from populace.storage.objects.contract import ObjectStore

console = Console()

TEMPORARY = 75
"""Exit code where the same may work later; EX_TEMPFAIL of sysexits.h."""

Store = Annotated[str, typer.Option(help="Where the population lives.", envvar="POPULACE_STORE")]

Name = Annotated[
    str | None, typer.Option(help="The population; needed when the store has several.")
]


def open_population(store: str, name: str | None) -> Population:
    """The population in `store`, on the base that it was created on."""
    from populace.configs.schema import BaseSettings
    from populace.population.client import Population

    opened, meta = find_population(store, name)
    return Population.open(opened, name=meta.name, base=BaseSettings(model=meta.base))


def find_population(store: str, name: str | None) -> tuple[ObjectStore, PopulationMeta]:
    """Store and identity of a population; loads no model."""
    from populace.storage.identity import PopulationMeta
    from populace.storage.objects.open import open_store

    opened = open_store(store)
    if name is None:
        names = [
            folder for folder in opened.folders() if PopulationMeta.find(opened, folder) is not None
        ]
        if not names:
            raise InvalidInput(
                f"{opened.url} holds no population; create one with `populace run CONFIG`"
            )
        if len(names) > 1:
            raise InvalidInput(
                f"{opened.url} holds {len(names)} populations {names}; choose one with --name"
            )
        name = names[0]
    meta = PopulationMeta.find(opened, name)
    if meta is None:
        raise InvalidInput(
            f"no population {name!r} in {opened.url}; create it with `populace run CONFIG`"
        )
    return opened, meta
