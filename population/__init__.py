"""Populace: a population of personal models on one shared base. This is the whole public API.

    population = Population.open("s3://people", name="assistants")
    population.enqueue("ada", [Task(prompt="What is rain?", reward="short")])
    population.revisions("ada")

`Population` is what a program holds. `Producer` and `Gateway` only take experience: they need less
of a process. Everything that Populace raises on purpose is a `PopulaceError`, so that one `except`
catches all of it; `storage/errors.py` draws the tree.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from populace.configs.load import load_settings
    from populace.configs.schema import Settings
    from populace.population.client import Population
    from populace.population.experience.events import (
        Demonstration,
        Experience,
        Messages,
        Task,
        Trajectory,
    )
    from populace.population.experience.gateway import Gateway
    from populace.population.experience.producer import Producer
    from populace.population.ledger.queries import ParkedEvent, PopulationStatus, RevisionInfo
    from populace.population.waves.rewards import Reply
    from populace.storage.errors import (
        AlreadyExists,
        Damaged,
        Fenced,
        Forgotten,
        InvalidInput,
        ObjectNotFound,
        OutcomeUnknown,
        Overloaded,
        OwnerAlive,
        PopulaceError,
        StoreUnavailable,
        UnsafeStore,
    )

_EXPORTS = {
    "populace.configs.load": ("load_settings",),
    "populace.configs.schema": ("Settings",),
    "populace.population.client": ("Population",),
    "populace.population.experience.events": (
        "Demonstration",
        "Experience",
        "Messages",
        "Task",
        "Trajectory",
    ),
    "populace.population.experience.gateway": ("Gateway",),
    "populace.population.experience.producer": ("Producer",),
    "populace.population.ledger.queries": ("ParkedEvent", "PopulationStatus", "RevisionInfo"),
    "populace.population.waves.rewards": ("Reply",),
    "populace.storage.errors": (
        "AlreadyExists",
        "Damaged",
        "Fenced",
        "Forgotten",
        "InvalidInput",
        "ObjectNotFound",
        "OutcomeUnknown",
        "Overloaded",
        "OwnerAlive",
        "PopulaceError",
        "StoreUnavailable",
        "UnsafeStore",
    ),
}
"""Module -> what it exports. Lazy, so that a program loads only what it uses: who enqueues loads
neither torch nor Ray."""

_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "AlreadyExists",
    "Damaged",
    "Demonstration",
    "Experience",
    "Fenced",
    "Forgotten",
    "Gateway",
    "InvalidInput",
    "Messages",
    "ObjectNotFound",
    "OutcomeUnknown",
    "Overloaded",
    "OwnerAlive",
    "ParkedEvent",
    "PopulaceError",
    "Population",
    "PopulationStatus",
    "Producer",
    "Reply",
    "RevisionInfo",
    "Settings",
    "StoreUnavailable",
    "Task",
    "Trajectory",
    "UnsafeStore",
    "load_settings",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
