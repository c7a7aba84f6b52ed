"""`populace doctor`: what it says, and that it is so."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from populace.configs.load import load_settings
from populace.population.tools.doctor import Finding, State, base, examine, ray_here, store_at
from populace.workers.actors.engine import ShardEngine
from tests.support.pretend import Pretended


def found(*overrides: str, store: str | None = None) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(load_settings(None, overrides), store)}


def test_on_a_cpu_it_says_why_no_gpu_is_used_and_tries_an_update() -> None:
    findings = found("base.dtype=float32", "base.model=random:mixtral-8x7b:3")
    assert findings["no GPU is used"].state is State.NOTE
    assert findings["a shard computes"].text == "on cpu in float32, by grouped"
    assert "took an update" in findings["tried"].text
    assert (
        findings["base"].state is State.NOTE
        and "base prepare random:mixtral-8x7b:3" in findings["base"].text
    )
    assert found("base.device=cpu")["no GPU is used"].text == "base.device is cpu"
    asked = found("base.device=cuda")
    assert asked["no GPU is used"].state is State.BAD and "tried" not in asked


def test_on_a_gpu_it_computes_there(tmp_path: Path) -> None:
    with Pretended().here():
        findings = found("base.dtype=float32", store=str(tmp_path))
    assert "no GPU is used" not in findings
    assert findings["a shard computes"].text == "on cuda in float32, by triton"
    assert (
        "took an update" in findings["tried"].text and "fast: attention" in findings["tried"].text
    )
    assert "keeps what Populace needs" in findings["store"].text


@pytest.mark.parametrize(
    ("changes", "store", "message"),
    [
        (["base.model=random:nope"], None, "is none; write random:PRESET"),
        (["base.model=/nonexistent/folder"], None, "/nonexistent/folder"),
        (["base.model=random:tiny"], "file:///tmp/kept", "say base.scratch=true"),
    ],
)
def test_a_base_that_a_run_would_refuse_is_bad(
    changes: list[str], store: str | None, message: str
) -> None:
    finding = base(load_settings(None, changes), store)
    assert finding.state is State.BAD and message in finding.text
    scratch = load_settings(None, ["base.model=random:tiny", "base.scratch=true"])
    assert base(scratch, "file:///tmp/kept").state is not State.BAD


def test_what_does_not_run_is_said_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(ShardEngine, "train_wave", fail)
    tried = found()["tried"]
    assert tried.state is State.BAD and "no kernel image is available" in tried.text


def test_a_store_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for url in (str(tmp_path / "file"), "ftp://host/bucket"):
        finding = store_at(url, "people")
        assert finding.state is State.BAD and url in finding.text
    assert store_at(None, "people").state is State.GOOD


@contextmanager
def listening() -> Iterator[int]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


def test_an_address_of_ray_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert ray_here().state is State.GOOD
    gone = ray_here()
    assert (
        gone.state is State.BAD and f"nobody answers at RAY_ADDRESS=127.0.0.1:{port}" in gone.text
    )
    for address, state, text in (
        ("http://127.0.0.1:8265", State.BAD, "only `ray job submit` takes"),
        ("HTTP://127.0.0.1:8265", State.BAD, "only `ray job submit` takes"),
        ("127.0.0.1:port", State.BAD, "nobody answers"),
        ("[::1", State.BAD, "nobody answers"),
        ("auto", State.GOOD, "joins this machine's cluster"),
        ("local", State.GOOD, "starts a Ray of its own"),
        (" ", State.GOOD, "starts a Ray of its own"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert ray_here().state is state and text in ray_here().text


def test_the_command_prints_every_part_and_ends_with_2_where_something_is_wrong() -> None:
    """As on a machine without a compiler."""
    command = [sys.executable, "-c", "from populace.population.cli.app import main; main()"]
    environment = {**os.environ, "PATH": "/nonexistent", "TRITON_INTERPRET": "0"}
    environment.pop("CC", None)
    done = subprocess.run(
        [*command, "doctor", "base.device=cuda", "--json"], env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    findings = {item["name"]: item for item in json.loads(done.stdout)}
    assert {"CPU", "GPU", "driver", "torch", "triton", "store", "Ray"} <= findings.keys()
    assert "none on the PATH" in findings["compiler"]["text"]
    assert findings["no GPU is used"]["state"] == "bad"
    assert torch.__version__ in findings["torch"]["text"]
