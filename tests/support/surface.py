"""The public surface as text: `python -m tests.support.surface > tests/public_surface.txt`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import populace.population as public
from populace.storage.errors import PopulaceError

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "storage", "configs", "workers", "population")


def surface() -> str:
    """Every exported name with its signature, and the tree of errors."""
    lines: list[str] = []
    for name in sorted(public.__all__):
        lines += described(name, getattr(public, name))
    import_everything()
    return "\n".join([*lines, "", "errors", *tree(PopulaceError, 1)]) + "\n"


def described(name: str, item: object) -> Iterator[str]:
    if not inspect.isclass(item):
        yield f"{name}{inspect.signature(item) if inspect.isfunction(item) else f' = {item}'}"
        return
    yield f"class {name}"
    if hasattr(item, "__dataclass_fields__"):
        for field in item.__dataclass_fields__.values():
            yield f"    {field.name}: {field.type}"
    for method, found in sorted(vars(item).items()):
        if method.startswith("_"):
            continue
        plain = found.__func__ if isinstance(found, staticmethod) else found
        if inspect.isfunction(plain):
            yield f"    {method}{inspect.signature(plain)}"


def tree(error: type[BaseException], depth: int) -> Iterator[str]:
    for child in sorted(error.__subclasses__(), key=lambda kind: kind.__name__):
        if child.__module__.startswith("populace."):
            yield f"{'    ' * depth}{child.__name__}"
            yield from tree(child, depth + 1)


def modules() -> Iterator[str]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(("populace", *parts)).removesuffix(".__init__")


def import_everything() -> None:
    for name in modules():
        importlib.import_module(name)


if __name__ == "__main__":
    print(surface(), end="")
