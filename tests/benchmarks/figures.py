"""What benchmarks print and write: figures with their spread, their aim, and whether it was met."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured quantity."""

    name: str
    median: float
    min: float
    max: float
    unit: str
    aim: str
    """Empty where there is none."""
    met: bool | None


def figure(
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    """`values` of repeated measurements in one run; the median is held against the aim."""
    median = statistics.median(values)
    aim, met = "", None
    if at_least is not None:
        aim, met = f">= {at_least:g}", median >= at_least
    if at_most is not None:
        aim, met = f"<= {at_most:g}", median <= at_most
    return Figure(
        name=name, median=median, min=min(values), max=max(values), unit=unit, aim=aim, met=met
    )


def publish(title: str, figures: Sequence[Figure], path: Path) -> None:
    """Print the table and write the list."""
    table = Table("", "median", "min", "max", "unit", "aim", "", title=title)
    for item in figures:
        mark = "" if item.met is None else "met" if item.met else "[red]missed[/]"
        table.add_row(
            item.name,
            *(f"{value:,.4g}" for value in (item.median, item.min, item.max)),
            item.unit,
            item.aim,
            mark,
        )
    Console(width=150).print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(item) for item in figures], indent=1))
