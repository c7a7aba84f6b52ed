"""The check for GPUs: its sections on a pretended device, and its runner where things go wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from tests.benchmarks.figures import figure
from tests.gpu_check.__main__ import run_all, run_stage
from tests.gpu_check.check import Check, LeftOut, Result, Status, keep, kept, run_section
from tests.gpu_check.report import MOST_PRINTED, printed, render
from tests.gpu_check.sections import SECTIONS, Section

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_every_section_passes_dry_within_what_a_machine_sends_back(tmp_path: Path) -> None:
    done = subprocess.run(
        # Half an hour: a busy machine must not run into limits that are a GPU's.
        [
            sys.executable, "-m", "tests.gpu_check", "--dry", "--minutes", "30", "--out",
            str(tmp_path),
        ],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log
    results = kept(tmp_path / "results.jsonl")
    assert {result.name for result in results} == {section.name for section in SECTIONS}
    assert {result.status for result in results} == {Status.PASSED}, done.stdout + log
    assert not any(result.figures for result in results), "a dry run measures nothing"
    assert len(done.stdout) < 12_000
    files = list(tmp_path.iterdir())
    assert len(files) <= 8 and all(file.stat().st_size < 16 << 20 for file in files)
    page = (tmp_path / "gpu.md").read_text()
    assert page == render(json.loads((tmp_path / "gpu.json").read_text()))
    assert "Nothing here has run on a GPU yet" in page and page.count("| passed |") == len(SECTIONS)


def check(tmp_path: Path, seconds: float = 30.0) -> Check:
    return Check(dry=False, out=tmp_path, seconds=seconds)


def test_a_section_says_what_became_of_it(tmp_path: Path) -> None:
    def figures(own: Check) -> None:
        own.figure("a step", [3.0, 1.0, 2.0], "ms", at_most=2.5)
        own.say("so")

    def half(own: Check) -> None:
        with own.trying("one"):
            raise ValueError("first line\n\nlast line")
        own.require(False, "two")
        own.say("it went on")

    def none(own: Check) -> None:
        raise LeftOut("no memory for it")

    def slow(own: Check) -> None:
        own.require(False, "one")
        time.sleep(20)

    passed = run_section("figures", figures, check(tmp_path))
    assert (passed.status, passed.lines) == (Status.PASSED, ("so",))
    assert passed.figures[0].median == 2.0 and passed.figures[0].met
    failed = run_section("half", half, check(tmp_path))
    assert failed.status is Status.FAILED and failed.lines == ("it went on",)
    assert failed.reason == "one: ValueError: first line … last line; two"
    left = run_section("none", none, check(tmp_path))
    assert (left.status, left.reason) == (Status.LEFT_OUT, "no memory for it")
    late = run_section("slow", slow, check(tmp_path, 0.2))
    assert late.status is Status.FAILED and late.reason.startswith("one; not done after its")
    assert late.seconds < 10
    for result in (passed, failed, left, late):
        keep(tmp_path / "results", result)
    assert kept(tmp_path / "results") == [passed, failed, left, late]


class Process:
    """A stage's process that does `act` at once."""

    pid = -1

    def __init__(self, code: int | None) -> None:
        self.code = code

    def wait(self, timeout: float) -> int:
        if self.code is None:
            raise subprocess.TimeoutExpired("stage", timeout)
        return self.code


def sections(*names: str, stage: str = "one") -> list[Section]:
    return [Section(name=n, stage=stage, module=n, limit_s=10.0, tells=n) for n in names]


def run(
    tmp_path: Path, wanted: Sequence[Section], act: Callable[[list[str]], int | None]
) -> dict[str, Result]:
    arguments = argparse.Namespace(out=tmp_path, dry=False, minutes=6.0)
    results = run_all(
        wanted, arguments, lambda stage, *_: Process(act([section.name for section in stage]))
    )
    return {result.name: result for result in results}


def test_a_process_that_dies_costs_the_section_that_it_was_at(tmp_path: Path) -> None:
    turns: list[list[str]] = []

    def act(names: list[str]) -> int:
        turns.append(names)
        for name in names:
            if name == "b":
                (tmp_path / "begun-one").write_text(name)
                return -11
            keep(tmp_path / "results.jsonl", Result(name=name, status=Status.PASSED))
        return 0

    found = run(tmp_path, [*sections("a", "b", "c"), *sections("d", stage="two")], act)
    assert turns == [["a", "b", "c"], ["c"], ["d"]]
    assert [result.status for result in found.values()] == [
        Status.PASSED, Status.DIED, Status.PASSED, Status.PASSED,
    ]  # fmt: skip
    assert found["b"].reason == "its process ended with -11"
    body = json.loads((tmp_path / "gpu.json").read_text())
    assert [item["status"] for item in body["sections"]] == ["passed", "died", "passed", "passed"]


def test_a_process_that_hangs_is_ended_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[object] = []
    monkeypatch.setattr("tests.gpu_check.__main__._end", ended.append)

    def act(names: list[str]) -> int | None:
        if names[0] == "a":
            return None  # before it begins anything
        keep(tmp_path / "results.jsonl", Result(name="b", status=Status.PASSED))
        return 0

    found = run(tmp_path, sections("a", "b"), act)
    assert found["a"].status is Status.DIED and "did not hear" in found["a"].reason
    assert found["b"].status is Status.PASSED and len(ended) == 1


def test_what_there_is_no_time_for_is_left_out_by_name(tmp_path: Path) -> None:
    names = [section.name for section in SECTIONS[:2]]
    run_stage(names, tmp_path, dry=True, minutes=6.0, deadline=time.time() + 3.0)
    results = kept(tmp_path / "results.jsonl")
    assert [result.name for result in results] == names
    assert {result.status for result in results} == {Status.LEFT_OUT}
    assert results[0].reason.endswith("s are left of 6 minutes")


def test_the_report_has_every_section_and_says_what_was_never_run() -> None:
    step = figure("a step", [700.0, 650.0, 900.0], "ms", at_most=600.0)
    ran = Result(name="waves", status=Status.FAILED, reason="a|b", figures=(step,), lines=("so",))
    body = {
        "date": "2026-11-28",
        "dry": False,
        "minutes": 6.0,
        "facts": {"card": "NVIDIA H100", "driver": "580"},
        "sections": [dataclasses.asdict(ran)],
    }
    page = render(body)
    assert "card NVIDIA H100" in page and "2026-11-28" in page
    assert "| a step | 700 | 650 | 900 | ms | <= 600 | missed |" in page
    assert page.count("| not run |") == len(SECTIONS) - 1 and "| failed |" in page
    long = dataclasses.replace(ran, lines=tuple("x" * 100 for _ in range(200)))
    body["sections"] = [dataclasses.asdict(long)]
    assert len(printed(body)) < MOST_PRINTED + 100 < 12_000
    assert "| a step |" in printed(body)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_refused(tmp_path: Path, minutes: str) -> None:
    command = [sys.executable, "-m", "tests.gpu_check", "--minutes", minutes]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "--minutes" in done.stderr and not list(tmp_path.iterdir())


def test_who_interrupts_it_ends_its_processes_and_keeps_what_was_found(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu_check", "--dry", "--out", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("begun-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children()
    stages = [own.pid for own in children if "--stage" in own.cmdline()]
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output, output
    assert stages and not any(psutil.pid_exists(pid) for pid in stages)
    assert "| died |" in (tmp_path / "gpu.md").read_text()
