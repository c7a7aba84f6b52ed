"""What a section of the check is given, and what is kept of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.figures import Figure, figure
from tests.support.pretend import Pretended


class Status(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    LEFT_OUT = "left out"
    """There was no time, or no memory, or what it builds on failed."""
    DIED = "died"
    """Its process ended in it, or was ended because it took too long."""
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one section. Example: `Result(name="bits", status=Status.PASSED)`."""

    name: str
    status: Status
    seconds: float = 0.0
    reason: str = ""
    lines: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()


@functools.cache
def pretended() -> Pretended:
    """One for a process, because it knows its tensors."""
    return Pretended()


class LeftOut(Exception):
    """Raised by a section that can't be had here; says why."""


class OutOfTime(Exception):
    """A section took longer than it may."""


@dataclass(slots=True)
class Check:
    """A section's way to say what it found.

    On a GPU everything runs on it; dry, on a pretended device and tiny shapes."""

    dry: bool
    out: Path
    seconds: float
    """What the section may take."""
    lines: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def figure(self, name: str, values: Sequence[float], unit: str, **aims: float) -> None:
        """A figure of repeated measurements. Dry, nothing is measured and nothing kept."""
        assert values and all(value == value for value in values), (name, values)
        if not self.dry:
            self.figures.append(figure(name, values, unit, **aims))

    def require(self, holds: bool, what: str) -> None:
        """A section goes on after what doesn't hold, and fails in the end."""
        if not holds:
            self.failures.append(what)

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Whatever fails inside is noted, and the section goes on."""
        try:
            yield
        except (LeftOut, OutOfTime):
            raise
        except Exception as error:
            self.failures.append(f"{what}: {_short(error)}")
            traceback.print_exc()

    @contextmanager
    def device(self, *, ours_alone: bool = True) -> Iterator[None]:
        """Inside, `cuda` is the GPU; dry, a pretended one, which finds what mixes host and device.
        `ours_alone`: no library that isn't ours moves tensors."""
        if not self.dry:
            yield
            return
        with pretended().here() as report:
            yield
        if ours_alone:
            found = {**report.mixes, **report.hazards, **report.cpu_code}
            self.require(not found, f"the pretended device found {found}")

    def seconds_of(self, call: Callable[[], Any], times: int = 5) -> list[float]:
        """Of each of `times` calls, after one that isn't counted; the device is done in the end."""
        taken = []
        for number in range(1 + (1 if self.dry else times)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if number:
                taken.append(time.perf_counter() - start)
        return taken


def run_section(name: str, run: Callable[[Check], None], check: Check) -> Result:
    """Run one section to its end, or until its time is up."""

    def give_up(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, check.seconds)
    status, reason = Status.PASSED, ""
    try:
        run(check)
        if check.failures:
            status, reason = Status.FAILED, "; ".join(check.failures)
    except LeftOut as error:
        status, reason = Status.LEFT_OUT, str(error)
    except OutOfTime:
        status = Status.FAILED
        reason = "; ".join([*check.failures, f"not done after its {check.seconds:.0f} s"])
    except Exception as error:
        traceback.print_exc()
        status, reason = Status.FAILED, "; ".join([*check.failures, _short(error)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    return Result(
        name=name,
        status=status,
        seconds=time.monotonic() - check.started,
        reason=reason,
        lines=tuple(check.lines),
        figures=tuple(check.figures),
    )


def keep(path: Path, result: Result) -> None:
    """Add what a section found to the file of its stage, a line each."""
    with open(path, "a") as file:
        file.write(json.dumps(dataclasses.asdict(result)) + "\n")


def kept(path: Path) -> list[Result]:
    """What sections found so far."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [result_of(json.loads(line)) for line in lines]


def result_of(body: dict[str, Any]) -> Result:
    """A result from its JSON."""
    figures = tuple(Figure(**item) for item in body["figures"])
    return Result(
        **{
            **body,
            "status": Status(body["status"]),
            "lines": tuple(body["lines"]),
            "figures": figures,
        }
    )


def _short(error: Exception) -> str:
    """The first and the last line that say something, in 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " … ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
    return f"{type(error).__name__}: {text}"[:300]
