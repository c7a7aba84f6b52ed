"""constraints.txt is one lock for CPUs and GPUs: it has what PyPI's CUDA build of its torch is
pinned to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"platform_system": "Linux", "sys_platform": "linux", "extra": ""}


def resolved(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Name -> metadata of what pip would install from PyPI alone, whatever index is set up here."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_CERT": os.environ.get("PIP_CERT", "")}
    if not environment["PIP_CERT"]:
        del environment["PIP_CERT"]
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet",
            "--index-url", "https://pypi.org/simple", "-c", str(ROOT / "constraints.txt"),
            "--report", str(folder / "report.json"), *arguments,
        ],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if "Failed to establish a new connection" in done.stderr or "timed out" in done.stderr:
        pytest.skip("PyPI can't be reached from here")
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text())
    return {item["metadata"]["name"]: item["metadata"] for item in report["install"]}


def locked() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


@pytest.mark.timeout(300)
def test_the_cuda_build_of_torch_wants_nothing_else_than_the_lock_has(tmp_path: Path) -> None:
    torch, versions = resolved(tmp_path, "--no-deps", "torch")["torch"], locked()
    assert torch["version"] == versions["torch"]
    needs = [Requirement(text) for text in torch["requires_dist"]]
    needs = [need for need in needs if need.marker is None or need.marker.evaluate(ENVIRONMENT)]
    assert any(need.name.startswith("nvidia-") for need in needs), "it is the CUDA build"
    wrong = [
        str(need)
        for need in needs
        if need.name in versions and not need.specifier.contains(versions[need.name])
    ]
    assert not wrong and "triton" in {need.name for need in needs}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_of_populace_resolves_with_a_cuda_build(tmp_path: Path) -> None:
    """Downloads 3 GB."""
    found = resolved(tmp_path, ".[demo]")
    assert {"torch", "triton", "ray", "populace"} <= found.keys()
    assert any(name.startswith("nvidia-cudnn") for name in found)
