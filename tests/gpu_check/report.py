"""Makes docs/measurements/gpu.md of what a check found: `python -m tests.gpu_check.report JSON`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from tests.gpu_check.check import Result, Status, result_of
from tests.gpu_check.sections import SECTIONS

MOST_PRINTED = 11_500
"""Characters; who calls a machine from afar sees the last 12,000."""


def facts() -> dict[str, str]:
    """What the figures depend on besides the code."""
    from populace.workers.cards import cards_here

    cards = cards_here()
    return {
        "card": ", ".join(cards.names) or "none",
        "driver": cards.driver or "none",
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }


def render(body: dict[str, Any]) -> str:
    """The whole page."""
    results = [result_of(item) for item in body["sections"]]
    found = {result.name for result in results}
    results += [Result(name=s.name, status=Status.NOT_RUN) for s in SECTIONS if s.name not in found]
    return "\n".join([*_head(body), *_states(results), *_details(results, body["dry"])]) + "\n"


def printed(body: dict[str, Any]) -> str:
    """What fits on a screen far away: states and figures first, then as many lines as there is room
    for."""
    results = [result_of(item) for item in body["sections"]]
    text = "\n".join([*_states(results), *_details(results, body["dry"])])
    if len(text) > MOST_PRINTED:
        text = text[:MOST_PRINTED].rsplit("\n", 1)[0] + "\n… the rest is in gpu.md"
    return text


def _head(body: dict[str, Any]) -> list[str]:
    lines = ["# On a GPU", ""]
    if body["dry"]:
        lines += [
            "**Nothing here has run on a GPU yet.** This is a dry run of `make gpu-check` on a",
            "CPU: every section on tiny shapes and, but for `path` and `actors`, which compute on",
            "the CPU, on a pretended device whose kernels are interpreted. It proves the check,",
            "says nothing about a card, and measures no figure. What the first run is held",
            "against:",
            "",
            *(f"- {aim}" for aim in AIMS),
        ]
    else:
        lines += [
            "Written by `make gpu-check`. The base's weights are random: routing is nearly even,",
            "the worst case for adapters' bytes and kinder than real skew for grouped products.",
            "Medians of three or five repetitions, smallest and largest beside them; what is",
            "compared was measured in one run on one card.",
        ]
    pairs = {"date": body["date"], **body["facts"], "limit": f"{body['minutes']:g} minutes"}
    return [*lines, "", ", ".join(f"{name} {value}" for name, value in pairs.items()), ""]


AIMS = (
    "64 users x 64 tokens on Qwen3-30B-A3B's dimensions, 48 layers, attention rank 8: at most "
    "600 ms",
    "10 times PEFT one by one, at least",
    "64 adapters over one, same tokens: 1.15 at most",
    "a user trained alone twice: the same bytes; beside others, and by replay, the same where the "
    "probe says invariant, else refused with the reason",
)
"""What the first run on a card is held against."""


def _states(results: list[Result]) -> list[str]:
    tells = {section.name: section.tells for section in SECTIONS}
    lines = ["| section | | | s | |", "|---|---|---|---|---|"]
    for result in results:
        lines.append(
            f"| {result.name} | {tells.get(result.name, '')} | {result.status} | "
            f"{result.seconds:.0f} | {result.reason.replace('|', '/')} |"
        )
    return [*lines, ""]


def _details(results: list[Result], dry: bool) -> list[str]:
    figures = [figure for result in results for figure in result.figures]
    lines = []
    if figures:
        lines += ["| figure | median | min | max | | aim | |", "|---|---|---|---|---|---|---|"]
        for item in figures:
            mark = "" if item.met is None else "met" if item.met else "missed"
            values = " | ".join(f"{value:,.4g}" for value in (item.median, item.min, item.max))
            lines.append(f"| {item.name} | {values} | {item.unit} | {item.aim} | {mark} |")
        lines.append("")
    for result in results:
        if result.lines:
            lines += [f"## {result.name}", "", *(f"- {line}" for line in result.lines), ""]
    return lines


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text())), end="")
