"""Populace: a population of personal models on one shared base. `Population` is the public API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from populace.population.client import Population
    from populace.population.experience.events import Demonstration, Task, Trajectory

__all__ = ["Demonstration", "Population", "Task", "Trajectory"]


def __getattr__(name: str) -> Any:
    # Lazy, because a reward worker imports this package and must not load torch for it.
    if name == "Population":
        from populace.population.client import Population

        return Population
    if name in __all__:
        from populace.population.experience import events as experience

        return getattr(experience, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
