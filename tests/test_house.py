"""The house: which room may know which, what the light doors load, and how large anything grows."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import typing
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.surface import PACKAGES, modules

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

FLOORS = {
    "kernels": [
        ["segments", "pointers", "route"],
        ["batches", "triton_experts"],
        ["plan"],
        ["lora", "grouped", "reference", "triton_lora"],
    ],
    "storage": [
        ["errors", "canonical", "paths", "lru"],
        ["objects"],
        ["keys"],
        ["log"],
        ["identity"],
        ["catalog"],
    ],
    "configs": [["schema"], ["checks"], ["load"]],
    "workers": [
        ["shapes", "cards"],
        ["device", "layout", "batch"],
        ["joins", "evidence", "interface", "shards"],
        ["adapters", "memory"],
        ["base"],
        ["step"],
        ["actors"],
    ],
    "population": [
        ["experience"],
        ["ledger"],
        ["waves"],
        ["evaluation", "watching", "sampler"],
        ["controller", "client"],
        ["tools"],
        ["page"],
        ["loop"],
        ["replicas"],
        ["run"],
        ["cli"],
    ],
}
"""Rooms of each package from the ground up: a room may know those on lower floors alone."""

BELOW = {
    "kernels": {"kernels"},
    "storage": {"storage"},
    "configs": {"configs", "storage.errors"},
    "workers": {"workers", "kernels", "storage", "configs"},
    "population": {"population", "workers", "kernels", "storage", "configs"},
}
"""What a package may import of Populace."""

MAY_IMPORT_RAY = {
    "workers/actors/shard.py",
    "workers/actors/group.py",
    "workers/actors/places.py",
    "population/experience/gateway.py",
    "population/watching/metrics.py",
    "population/page/serve.py",
    "population/waves/reward_tasks.py",
    "population/replicas/follower.py",
    "population/replicas/leader.py",
    "population/run.py",
}

LIGHT = {
    "enqueueing": "from populace.population import Population, Producer, Task",
    "experience": (
        "import populace.population.experience.producer, populace.population.experience.files"
    ),
    "ledger": "import populace.population.ledger.queries, populace.population.ledger.ownership",
    "client": "import populace.population.client",
    "cli": "import populace.population.cli.app",
    "watching": "import populace.population.watching.beacon, populace.population.watching.rates, "
    "populace.population.watching.stop",
    "rewards": "from populace.population import Reply",
}
"""Doors that must stay light, and what is imported to go through them."""


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports when it runs, and what it imports of a package."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = ROOT.joinpath(*node.module.removeprefix("populace.").split("."))
            if node.module.startswith("populace.") and inside.is_dir():
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def floor_of(package: str, room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS[package]) if room in rooms)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_stands_on_a_floor(package: str) -> None:
    rooms = {
        path.stem
        for path in (ROOT / package).iterdir()
        if (path.is_dir() and any(path.rglob("*.py"))) or path.suffix == ".py"
    }
    listed = {room for rooms in FLOORS[package] for room in rooms}
    assert rooms - {"__init__"} <= listed, "place a new room in FLOORS"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_arrow_runs_up(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] == "__init__":
            continue
        for name in imports(path):
            if not name.startswith("populace."):
                continue
            inner = name.removeprefix("populace.")
            assert any(inner == ok or inner.startswith(f"{ok}.") for ok in BELOW[package]), (
                f"{path} imports {name}"
            )
            target = inner.split(".")
            if target[0] == package and target[1] != parts[1]:
                assert floor_of(package, target[1]) < floor_of(package, parts[1]), (
                    f"{path} imports {name}, which is not below it"
                )


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_is_left_in_a_room(package: str) -> None:
    """Imports that run when a module is imported form no circle, also inside one room."""
    known = {
        ".".join(("populace", *path.relative_to(ROOT).with_suffix("").parts)): path
        for path in (ROOT / package).rglob("*.py")
    }
    below = {
        name: {other for other in imports(path) if other in known} for name, path in known.items()
    }
    while below:
        free = [name for name, others in below.items() if not others & below.keys()]
        assert free, f"a circle among {sorted(below)}"
        for name in free:
            del below[name]


def test_ray_stays_at_the_edges() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in FILES
        for name in imports(path)
        if name == "ray" or name.startswith("ray.")
    }
    assert found == MAY_IMPORT_RAY


@pytest.mark.parametrize("door", LIGHT)
def test_a_light_door_loads_neither_torch_nor_transformers_nor_ray(door: str) -> None:
    heavy = (
        "[name for name in ('torch', 'transformers', 'ray', 'matplotlib') if name in sys.modules]"
    )
    code = f"import json, sys; {LIGHT[door]}; print(json.dumps({heavy}))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == []


def test_nothing_grows_too_large_to_read() -> None:
    """Files have at most 350 lines, or say at their top why they are one; functions at most 60."""
    for path in FILES:
        text = path.read_text()
        if text.count("\n") > 350:
            assert "One file because" in (ast.get_docstring(ast.parse(text)) or ""), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"


def test_nothing_public_changes_unnoticed() -> None:
    """On purpose: `python -m tests.support.surface > tests/public_surface.txt`, and a line in
    CHANGELOG.md."""
    said = subprocess.run(
        [sys.executable, "-m", "tests.support.surface"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said == (ROOT / "tests/public_surface.txt").read_text()
    drawn = set(re.findall(r"[├└]── (\w+)", (ROOT / "storage/errors.py").read_text()))
    tree = said.split("\nerrors\n")[1]
    assert drawn == {line.strip() for line in tree.splitlines() if not line.startswith(" " * 8)}


def test_a_wheel_holds_every_module_and_starts(tmp_path: Path) -> None:
    """Not the editable install: whatever is missing from pyproject.toml is missing there."""
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([*wheel, "-w", tmp_path, source], check=True, timeout=300)
    (found,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(found) as archive:
        archive.extractall(tmp_path / "site")
    # Without `site` no .pth file of the environment is read: nothing leads back to this checkout.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    where = f"import sys; sys.path[:] = [{str(tmp_path / 'site')!r}, *sys.path, *{libraries!r}]"
    names = list(modules())
    code = f"{where}; import importlib; [importlib.import_module(name) for name in {names!r}]"
    code += "; import populace.kernels; print(populace.kernels.__file__)"
    said = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr[-2000:]
    assert said.stdout.splitlines()[-1].startswith(str(tmp_path / "site"))
    code = f"{where}; from populace.population.cli.app import main; main()"
    said = subprocess.run(
        [sys.executable, "-S", "-c", code, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert said.returncode == 0 and "enqueue" in said.stdout, said.stderr


def test_every_kind_of_experience_is_in_every_registry() -> None:
    from populace.population.experience.checks import CHECKS
    from populace.population.experience.events import EXPERIENCE_KINDS, Experience
    from populace.population.waves.prepare import PREPARERS
    from populace.workers.batch import ExperienceKind
    from populace.workers.step.losses import OBJECTIVES

    kinds = set(EXPERIENCE_KINDS.values())
    assert kinds == set(typing.get_args(Experience)) == set(CHECKS) == set(PREPARERS)
    assert set(OBJECTIVES) == set(ExperienceKind)


def test_nobody_but_the_device_says_where_a_tensor_is() -> None:
    """No other module of workers and kernels moves a tensor or names a device; what is made beside
    a tensor (`device=x.device`) is where that is, and `to` changes dtypes alone."""
    dtype, found = re.compile(r"dtype|^torch\.\w+$|^tl\."), []
    for path in (*(ROOT / "workers").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")):
        if path == ROOT / "workers/device.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            given = [ast.unparse(value) for value in node.args]
            names_it = any(
                word.arg == "device" and isinstance(word.value, (ast.Constant, ast.Call))
                for word in node.keywords
            )
            moves = name in ("cpu", "cuda", "pin_memory") or (
                name == "to" and not all(dtype.search(own) for own in given)
            )
            if names_it or moves:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert found == []


OLD_WORDS = {
    r"processors?": "CPU",
    r"signs? of life": "heartbeat",
    r"show(s|ed|n)? (no )?life": "heartbeat",
    r"fill(s|ed|ing) up": "padding",
    r"(?<!the )forgetting": "erasure",
}
"""Words of our own for what the field has a name for."""


def test_prose_speaks_the_fields_words() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "infra").rglob("*.md")]
    pages += [path for path in (ROOT / "docs").rglob("*.md") if "measurements" not in path.parts]
    for path in [*FILES, *pages]:
        text = path.read_text()
        for old, new in OLD_WORDS.items():
            found = re.search(rf"\b{old}\b", text)
            assert found is None, f"{path}: {found and found.group()!r}; say {new}"


@pytest.mark.parametrize("page", ["docs/structures.md", "CONTRIBUTING.md"])
def test_files_and_names_that_the_map_mentions_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for path in re.findall(r"`([\w/]+/[\w./]*)`", text):
        assert (ROOT / path).exists(), f"{page} names {path}"
    sources = "\n".join(path.read_text() for path in [*FILES, *(ROOT / "tests").rglob("*.py")])
    for name in re.findall(r"`((?:[A-Z_]\w+)(?:\.\w+)*)`", text):
        for part in name.split("."):
            assert re.search(rf"\b{part}\b", sources), f"{page} names {name}"


def test_the_package_list_names_every_folder() -> None:
    """A wheel holds what is listed, and nothing warns of what isn't."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        "populace." + ".".join(path.parent.relative_to(ROOT).parts)
        for path in FILES
        if path.name == "__init__.py"
    }
    assert {name for name in listed["packages"] if name != "populace"} == folders
    assert {path.parent for path in FILES} == {
        ROOT.joinpath(*name.split(".")[1:]) for name in folders
    }
