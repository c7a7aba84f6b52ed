"""The overview's live table: one row per controller."""

from __future__ import annotations

from collections.abc import Sequence

from populace.population.watching.rates import ControllerRates, last_wave, tiers


def live_rows(controllers: Sequence[ControllerRates]) -> list[dict[str, object]]:
    """What the overview asks for again and again."""
    rows: list[dict[str, object]] = []
    for item in controllers:
        figures, counts = item.seen.figures, item.seen.figures.counts
        per_min = 60 * item.per_s.get("committed", 0.0)
        cells = [
            item.seen.name,
            "silent" if item.is_silent else figures.state,
            figures.num_partitions,
            counts.get("waves", 0),
            f"{per_min:.1f}",
            *(counts.get(decision, 0) for decision in ("promote", "reject", "rollback")),
            f"{item.per_s.get('tokens', 0.0):.0f}",
            figures.num_pending,
            f"{figures.oldest_wait_s:.0f} s",
            tiers(figures.residency),
            last_wave(figures.last_wave),
        ]
        rows.append({"cells": cells, "revisions_per_min": per_min})
    return rows
