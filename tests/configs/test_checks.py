"""The bounds of settings, one by one and between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from populace.configs.checks import problems
from populace.configs.load import load_settings
from populace.configs.schema import BOUND, Settings
from populace.storage.errors import InvalidInput

UNBOUNDED = {"seed"}
"""Numbers that may be anything."""


def fields_of(section: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting by its dotted path."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


NUMBERS = [
    path
    for path, field in fields_of(Settings())
    if str(field.type).startswith(("int", "float")) and path not in UNBOUNDED
]
WORDS = [
    path for path, field in fields_of(Settings()) if field.type == "str" and BOUND in field.metadata
]


def test_defaults_are_consistent() -> None:
    assert problems(Settings()) == []


@pytest.mark.parametrize("path", NUMBERS)
def test_every_number_refuses_minus_one_and_nan(path: str) -> None:
    with pytest.raises(InvalidInput, match=rf"{path} is -1(\.0)?; use"):
        load_settings(None, [f"{path}=-1"])
    field = dict(fields_of(Settings()))[path]
    if "float" in str(field.type):
        with pytest.raises(InvalidInput, match=f"{path} is nan; use"):
            load_settings(None, [f"{path}=.nan"])


@pytest.mark.parametrize("path", WORDS)
def test_every_word_out_of_a_few_refuses_others(path: str) -> None:
    with pytest.raises(InvalidInput, match=f"{path} is 'nonsense'; use one of "):
        load_settings(None, [f"{path}=nonsense"])


def test_bounds_hold_inside_maps_of_sections() -> None:
    with pytest.raises(InvalidInput, match=r"scheduler.tenants\['gold'\].weight is 0.0; use a"):
        load_settings(None, ["scheduler.tenants.gold.weight=0"])
