"""The command line, as a person uses it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from populace.configs.schema import Settings
from populace.population.cli.app import app
from populace.population.client import Population
from populace.population.controller import Controller
from populace.storage.errors import InvalidInput
from populace.workers.base.registry import find_base, prepare_base
from tests.support.streams import experience

POPULACE = [sys.executable, "-c", "from populace.population.cli.app import main; main()"]


@pytest.fixture
def store(settings: Settings, start: Callable[..., Controller], tmp_path: Path) -> str:
    """A population of two users after three waves."""
    settings = dataclasses.replace(settings, name="cli")
    population = Population.create(f"file://{tmp_path}/store", settings)
    population.enqueue_many(experience(settings, num_users=2))
    controller = start(population)
    for _ in range(3):
        controller.wave()
    population.ownership.release()
    return f"file://{tmp_path}/store"


def populace(*words: str) -> str:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_command_answers_about_a_population(store: str, tmp_path: Path) -> None:
    assert re.search(r"adapters +2", populace("status", "--store", store))
    chain = populace("revisions", "user-0", "--store", store)
    assert "serving" in chain and "tip" in chain
    assert re.search(r"│ \d+[sm] ", chain), "how long ago"
    manifest = json.loads(populace("show", "user-0@1", "--store", store))
    assert manifest["predicateType"] == "https://slsa.dev/provenance/v1"
    assert populace(
        "sample", "user-0", "what is rain", "--max-new-tokens", "5", "--store", store
    ).strip()
    assert "match their manifests" in populace("verify", "user-0", "--store", store)
    populace("rollback", "user-0", "1", "--store", store)
    assert "rollback" in populace("revisions", "user-0", "--store", store)
    populace("export", "user-0", str(tmp_path / "out"), "--store", store)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["revisions", "nobody"], "user 'nobody' has no adapter"),
        (["show", "user-0"], "write it as USER@NUMBER"),
        (["show", "user-0@77"], "revision 77 does not exist"),
        (["rollback", "user-0", "77"], "revision 77 does not exist"),
        (["sample", "user-0", "hi", "--revision", "latest"], "use serving, tip or a number"),
        (["status", "--name", "other"], "no population 'other'"),
    ],
)
def test_misuse_is_one_clear_error(store: str, words: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        populace(*words, "--store", store)


def test_a_bad_configuration_prints_one_line_and_writes_nothing(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"store: file://{tmp_path}/store\nadaptr: {{rank: 4}}\n")
    done = subprocess.run(
        [*POPULACE, "run", str(config)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "unknown setting 'adaptr'; did you mean adapter?" in done.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("content", ["- a\n- list\n", "{", "\x00"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: str) -> None:
    from populace.configs.load import load_settings

    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InvalidInput, match=r"config\.yaml"):
        load_settings(tmp_path / "config.yaml")


def test_a_local_checkpoint_is_registered_by_name(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POPULACE_CACHE", str(tmp_path / "cache"))
    stages: list[str] = []
    base = prepare_base(str(bases["mixtral"]), stages.append)
    assert stages and find_base("mixtral") == base == prepare_base("mixtral", stages.append)
    (tmp_path / "mixtral").symlink_to(bases["qwen3_moe"])
    with pytest.raises(InvalidInput, match="registered already"):
        prepare_base(str(tmp_path / "mixtral"), stages.append)
