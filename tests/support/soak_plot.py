"""Draws what an endurance run measured: `python -m tests.support.soak_plot FOLDER
docs/measurements/soak.png`."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(folder: Path, path: Path) -> None:
    """Events, backlog and memory over time; kills as lines."""
    samples = json.loads((folder / "samples.json").read_text())
    minutes = [sample["seconds"] / 60 for sample in samples]
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(9, 9), sharex=True, layout="constrained"
    )
    top.plot(
        minutes,
        [sample["sent"] / 1000 for sample in samples],
        label="events acknowledged, thousands",
    )
    top.plot(minutes, [sample["waves"] / 100 for sample in samples], label="waves, hundreds")
    middle.plot(
        minutes,
        [sample["waiting"] for sample in samples],
        color="tab:red",
        label="events that wait",
    )
    for role in sorted({name for sample in samples for name in sample["memory_mb"]}):
        bottom.plot(
            minutes, [sample["memory_mb"].get(role, float("nan")) for sample in samples], label=role
        )
    bottom.set_ylabel("MB of its own")
    bottom.set_xlabel("minutes")
    bottom.set_ylim(bottom=0)
    for before, after in itertools.pairwise(samples):
        if after["kills"] > before["kills"]:
            for axes in (top, middle, bottom):
                axes.axvline(after["seconds"] / 60, color="gray", lw=0.6, ls=":")
    for axes in (top, middle, bottom):
        axes.legend(fontsize=8, loc="upper left")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
