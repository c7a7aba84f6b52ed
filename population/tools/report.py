"""What a population learned, for people and for machines: report.html and report.json.

What is measured: `matrix.py`.
"""

from __future__ import annotations

import base64
import html
import io
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from populace.population.controller import Controller
from populace.population.tools.matrix import MAX_USERS, report_figures, user_of

STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
img{max-width:100%}"""


def write_report(controller: Controller, folder: Path, started: float) -> dict[str, Any]:
    """Measure what isn't known yet, then write both files into `folder`. `started`: the run's start
    on the monotonic clock."""
    adapters = [
        adapter
        for adapter in sorted(controller.ledger.catalog, key=lambda item: user_of(controller, item))
        if controller.examiner.heldout_tasks(adapter.pseudonym)
    ][:MAX_USERS]
    for adapter in adapters:
        controller.examiner.measure([(adapter, 0), (adapter, adapter.serving)])
    figures = report_figures(controller, adapters) | {"wall_s": time.monotonic() - started}
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / ".report.json"
    whole.write_text(json.dumps(figures, indent=1, ensure_ascii=False))
    # Whoever reads it meanwhile sees all of it, or the one before.
    whole.replace(folder / "report.json")
    (folder / "report.html").write_text(_html(figures))
    return figures


def print_report(folder: Path, console: Console) -> None:
    """The table at the end of a run."""
    figures = json.loads((folder / "report.json").read_text())
    table = Table("user", "rank", "base", "after", "gain", "own - others", "revisions", "tokens")
    for name, user in figures["users"].items():
        table.add_row(
            name,
            str(user["rank"]),
            f"{user['heldout_reward_base']:.2f}",
            f"{user['heldout_reward_after']:.2f}",
            f"{user['heldout_reward_after'] - user['heldout_reward_base']:+.2f}",
            f"{user['own_minus_others']:+.2f}",
            str(user["num_revisions"]),
            str(user["num_tokens"]),
        )
    table.add_section()
    base, after = figures["heldout_reward_base"], figures["heldout_reward_after"]
    table.add_row(
        "mean", "", f"{base:.2f}", f"{after:.2f}", f"{after - base:+.2f}",
        f"{figures['own_minus_others']:+.2f}",
        str(figures["num_revisions"]), "",
    )  # fmt: skip
    console.print(table)
    console.print(
        f"held-out reward, 0 to 1; {figures['wall_s']:.0f} s; more in {folder / 'report.html'}"
    )


def _html(figures: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{user['rank']}<td>{user['heldout_reward_base']:.2f}"
        f"<td>{user['heldout_reward_after']:.2f}"
        f"<td>{user['heldout_reward_after'] - user['heldout_reward_base']:+.2f}"
        f"<td>{user['own_minus_others']:+.2f}<td>{user['num_revisions']}<td>{user['num_tokens']}"
        for name, user in figures["users"].items()
    )
    replies = "".join(
        f"<tr><td>{html.escape(name)}<td>{html.escape(item['prompt'])}<td>{html.escape(item['before'])}"
        f"<td>{html.escape(item['after'])}"
        for name, user in figures["users"].items()
        for item in user["samples"]
    )
    base, after = figures["heldout_reward_base"], figures["heldout_reward_after"]
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>Populace: {html.escape(figures["population"])}</title>
<style>{STYLE}</style>
<h1>{html.escape(figures["population"])}</h1>
<p>{len(figures["users"])} users on <b>{html.escape(figures["base"])}</b>,
{figures["num_revisions"]} revisions, {figures["wall_s"]:.0f} s. Mean held-out reward
<b>{base:.2f}</b> on the base, <b>{after:.2f}</b> with the users' own adapters; own adapters beat
the others' by <b>{figures["own_minus_others"]:+.2f}</b> on their users' tasks.</p>
<table><tr><th>user<th>rank<th>base<th>after<th>gain<th>own - others<th>revisions<th>tokens</tr>
{rows}</table>
<h2>Specialisation</h2><p>Every adapter (row) on every user's held-out tasks (column).</p>
{_image(_draw_matrix(figures))}
<h2>Learning curves</h2><p>Mean reward of the rollouts that each revision learned from.</p>
{_image(_draw_curves(figures))}
<h2>Replies</h2><table><tr><th>user<th>prompt<th>before<th>after</tr>{replies}</table>
</html>"""


def _draw_matrix(figures: dict[str, Any]) -> Any:
    names = list(figures["users"])
    figure, axes = _subplots(7)
    image = axes.imshow(figures["matrix"], vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("held-out tasks of")
    axes.set_ylabel("adapter of")
    figure.colorbar(image, label="mean reward")
    return figure


def _draw_curves(figures: dict[str, Any]) -> Any:
    figure, axes = _subplots(4.5)
    for name, user in figures["users"].items():
        curve = user["curve"]
        axes.plot(
            [p["revision"] for p in curve],
            [p["reward"] for p in curve],
            alpha=0.6,
            lw=1,
            label=name,
        )
    last = max(
        (p["revision"] for user in figures["users"].values() for p in user["curve"]), default=0
    )
    means = [
        fmean(values)
        for number in range(1, last + 1)
        if (
            values := [
                p["reward"]
                for user in figures["users"].values()
                for p in user["curve"]
                if p["revision"] == number
            ]
        )
    ]
    axes.plot(range(1, len(means) + 1), means, color="black", lw=3, label="mean")
    axes.set_xlabel("revision")
    axes.set_ylabel("reward of its rollouts")
    axes.set_ylim(0, 1)
    axes.legend(ncols=2, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _subplots(height_inches: float) -> tuple[Any, Any]:
    """A figure with one pair of axes, drawn without a display."""
    from matplotlib.figure import Figure  # takes a second to import, and only reports need it

    figure = Figure(figsize=(8.5, height_inches), layout="constrained")
    return figure, figure.subplots()


def _image(figure: Any) -> str:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(sink.getvalue()).decode()}">'
