"""Runs the sections, each stage of them in a process of its own, under one clock.

    python -m tests.gpu_check [--minutes 6] [--only NAME] [--dry] [--out FOLDER]

What a stage found is on the disk after each section. A process that dies, or that takes longer than
its section may, costs that section: the rest of its stage goes on in a new one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.gpu_check.check import Check, Result, Status, keep, kept, run_section
from tests.gpu_check.report import facts, printed, render
from tests.gpu_check.sections import SECTIONS, Section

GRACE_S = 15.0
"""For starting a process, and for one that doesn't hear that its time is up."""
FULL_MINUTES = 6.0
START_S = 8.0
"""Of a section's limit has to be left for it to be begun, at least."""


_interrupted = threading.Event()
_running: set[Any] = set()
"""Processes of stages: what interrupts this one ends them."""


def limit_of(section: Section, minutes: float) -> float:
    return section.limit_s * minutes / FULL_MINUTES


def run_stage(names: Sequence[str], out: Path, dry: bool, minutes: float, deadline: float) -> None:
    """In a process of its own: these sections, until `deadline` on the wall clock."""
    path = out / "results.jsonl"
    for section in SECTIONS:
        if section.name not in names:
            continue
        left = deadline - time.time()
        limit = limit_of(section, minutes)
        if left < min(START_S, limit):
            reason = f"{max(left, 0.0):.0f} s are left of {minutes:g} minutes"
            keep(path, Result(name=section.name, status=Status.LEFT_OUT, reason=reason))
            continue
        _begun(out, section.stage).write_text(section.name)
        check = Check(dry=dry, out=out, seconds=min(limit, left))
        found = run_section(section.name, section.run, check)
        keep(path, found)
        print(f"{found.name}: {found.status} {found.reason}", flush=True)


def _process(stage: Sequence[Section], arguments: argparse.Namespace, deadline: float) -> Any:
    names = ",".join(section.name for section in stage)
    command = [
        sys.executable, "-m", "tests.gpu_check", "--stage", names, "--out", str(arguments.out),
        "--minutes", str(arguments.minutes), "--deadline", str(deadline),
    ]  # fmt: skip
    log = open(arguments.out / "log.txt", "a")  # noqa: SIM115
    return subprocess.Popen(
        [*command, "--dry"] if arguments.dry else command,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env={**os.environ, "TRITON_INTERPRET": "1" if arguments.dry else "0"},
    )


def run_all(
    sections: Sequence[Section],
    arguments: argparse.Namespace,
    start: Callable[[Sequence[Section], argparse.Namespace, float], Any] = _process,
) -> list[Result]:
    """Every section's result, in their order. `start`: begins a stage's process."""
    deadline, writing = time.time() + 60 * arguments.minutes, threading.Lock()
    stages = [
        [section for section in sections if section.stage == name]
        for name in dict.fromkeys(section.stage for section in sections)
    ]

    def finish(stage: Sequence[Section]) -> None:
        while stage and not _interrupted.is_set():
            stage = _go_on(stage, arguments, deadline, start)
            with writing:
                _write(sections, arguments)

    # On a CPU two at a time: nothing is measured there.
    with ThreadPoolExecutor(2 if arguments.dry else 1) as pool:
        try:
            list(pool.map(finish, stages))
        except KeyboardInterrupt:
            _interrupted.set()
            for process in list(_running):
                _end(process)
    return _in_order(sections, kept(arguments.out / "results.jsonl"))


def _go_on(
    stage: Sequence[Section],
    arguments: argparse.Namespace,
    deadline: float,
    start: Callable[[Sequence[Section], argparse.Namespace, float], Any],
) -> list[Section]:
    """Have a process do these sections of one stage; which are left when it ends before its time.
    The one that it ended in is not among them."""
    out, path = arguments.out, arguments.out / "results.jsonl"
    begun = _begun(out, stage[0].stage)
    begun.unlink(missing_ok=True)
    process = start(stage, arguments, deadline)
    _running.add(process)
    limit = sum(limit_of(section, arguments.minutes) for section in stage) + GRACE_S
    try:
        code = process.wait(min(limit, max(deadline - time.time(), 0.0) + GRACE_S))
        reason = f"its process ended with {code}"
    except subprocess.TimeoutExpired:
        reason = "its process was ended: it did not hear that its time is up"
        _end(process)
    finally:
        _running.discard(process)
    done = {result.name for result in kept(path)}
    left = [section for section in stage if section.name not in done]
    if left:  # whoever was at it, or the first that was not begun
        name = begun.read_text() if begun.is_file() else ""
        victim = next((section for section in left if section.name == name), left[0])
        keep(path, Result(name=victim.name, status=Status.DIED, reason=reason))
        left.remove(victim)
    begun.unlink(missing_ok=True)
    return left


def _begun(out: Path, stage: str) -> Path:
    """Where a stage's process writes which section it is at."""
    return out / f"begun-{stage}"


def _end(process: Any) -> None:
    os.killpg(process.pid, 9)
    process.wait()


def _in_order(sections: Sequence[Section], found: Sequence[Result]) -> list[Result]:
    by_name = {result.name: result for result in found}
    nothing = {s.name: Result(name=s.name, status=Status.NOT_RUN) for s in sections}
    return [by_name.get(section.name, nothing[section.name]) for section in sections]


def _write(sections: Sequence[Section], arguments: argparse.Namespace) -> dict[str, Any]:
    """The results so far, for machines and for docs/measurements/gpu.md."""
    out = arguments.out
    results = _in_order(sections, kept(out / "results.jsonl"))
    body = {
        "date": datetime.now(UTC).date().isoformat(),
        "dry": arguments.dry,
        "minutes": arguments.minutes,
        "facts": facts(),
        "sections": [dataclasses.asdict(result) for result in results],
    }
    (out / "gpu.json").write_text(json.dumps(body, indent=1))
    (out / "gpu.md").write_text(render(body))
    return body


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < 24 * 60:
        raise argparse.ArgumentTypeError(f"{text} minutes; give a number above zero")
    return value


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=_minutes, default=FULL_MINUTES, help="for everything")
    parser.add_argument("--only", help="one section, with those that it builds on")
    parser.add_argument("--dry", action="store_true", help="tiny, on a pretended device")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu-check")))
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out: Path = arguments.out
    if arguments.stage:
        names = arguments.stage.split(",")
        run_stage(names, out, arguments.dry, arguments.minutes, arguments.deadline)
        return 0
    sections = [
        section
        for section in SECTIONS
        if arguments.only in (None, section.name)
        # The others of its stage use the base that this one opens.
        or (section.name == "base" and _stage_of(arguments.only) == section.stage)
    ]
    if not sections:
        parser.error(f"--only {arguments.only}: use {', '.join(s.name for s in SECTIONS)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {out}: {error.strerror}; give a folder that can be written to")
    signal.signal(signal.SIGTERM, _interrupt)
    for name in ("results.jsonl", "log.txt", "gpu.json", "gpu.md", "profile.txt"):
        (out / name).unlink(missing_ok=True)
    results = run_all(sections, arguments)
    print(printed(_write(sections, arguments)))
    failed = any(result.status in (Status.FAILED, Status.DIED) for result in results)
    return 130 if _interrupted.is_set() else int(failed)


def _stage_of(name: str | None) -> str:
    return next((section.stage for section in SECTIONS if section.name == name), "")


if __name__ == "__main__":
    sys.exit(main())
