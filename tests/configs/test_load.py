"""Configuration files and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from populace.configs.load import load_settings
from populace.configs.schema import Settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/*/*.yaml")]), ids=str
)
def test_every_preset_loads(path: Path) -> None:
    assert isinstance(load_settings(path), Settings)


def test_overrides_win_over_the_file() -> None:
    assert load_settings(ROOT / "configs/tiny.yaml", ["adapter.rank=7"]).adapter.rank == 7
