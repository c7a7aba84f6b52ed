"""Writes the dashboard that Grafana loads: `python infra/grafana/build.py`, or `make docs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
OF = '{population=~"$population"}'
WINDOW = "$__rate_interval"

Panel = tuple[str, str, str, list[tuple[str, str]]]
"""Title, unit of Grafana's, what it says, and (legend, query) pairs."""


def rate(name: str, by: str = "", more: str = "") -> str:
    """Per second, summed over controllers."""
    selector = OF if not more else OF[:-1] + f",{more}}}"
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate(ray_populace_{name}{selector}[{WINDOW}]))"


def gauge(name: str, function: str = "sum", by: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"{function}{grouping} (ray_populace_{name}{OF})"


def quantile(share: float, name: str) -> str:
    return (
        f"histogram_quantile({share}, sum by (le) (rate(ray_populace_{name}_bucket{OF}[{WINDOW}])))"
    )


ROWS: list[tuple[str, list[Panel]]] = [
    (
        "Churn",
        [
            (
                "Adapter changes",
                "opm",
                "Revisions committed, and what verdicts and commands did to them, per minute.",
                [("{{change}}", f"60 * {rate('adapter_changes_total', 'change')}")],
            ),
            ("Waves", "opm", "Fused steps per minute.", [("waves", f"60 * {rate('waves_total')}")]),
            (
                "Adapters per wave",
                "short",
                "How many users' updates share a step.",
                [
                    ("median", quantile(0.5, "wave_adapters")),
                    ("90 %", quantile(0.9, "wave_adapters")),
                ],
            ),
        ],
    ),
    (
        "Work",
        [
            (
                "Phases of a wave",
                "s",
                "Mean seconds of a turn by phase: where a wave's time goes.",
                [
                    (
                        "{{phase}}",
                        f"{rate('phase_seconds_sum', 'phase')} / scalar({rate('waves_total')})",
                    )
                ],
            ),
            (
                "Wave time",
                "s",
                "Wall time of a turn.",
                [
                    ("median", quantile(0.5, "wave_seconds")),
                    ("95 %", quantile(0.95, "wave_seconds")),
                ],
            ),
            (
                "Tokens learned from",
                "short",
                "Completion tokens per second.",
                [("tokens/s", rate("tokens_total"))],
            ),
            (
                "Step efficiency",
                "percentunit",
                "Rows of the fused step that were tokens to learn from.",
                [("efficiency", gauge("step_efficiency", "avg"))],
            ),
            (
                "Reward",
                "short",
                "Mean reward of the last wave's rollouts.",
                [("{{controller}}", gauge("reward", "avg", "controller"))],
            ),
        ],
    ),
    (
        "Queue",
        [
            (
                "Waiting events",
                "short",
                "Experience that waits to be trained.",
                [("events", gauge("pending_events"))],
            ),
            (
                "Oldest wait",
                "s",
                "How long the user who has waited longest has waited.",
                [("wait", gauge("oldest_wait_seconds", "max"))],
            ),
            (
                "Experience used",
                "ops",
                "Events trained on, and events settled without, per second.",
                [
                    ("trained", rate("trained_events_total")),
                    ("{{reason}}", rate("settled_events_total", "reason")),
                ],
            ),
        ],
    ),
    (
        "Residency",
        [
            (
                "Adapters by tier",
                "short",
                "Hot in slots, warm in memory, near on disk, all in the store.",
                [
                    (
                        "{{tier}}",
                        (
                            "sum by (tier) "
                            '(ray_populace_adapters{population=~"$population",tier!="store"})'
                        ),
                    ),
                    # Every controller says the same of the store.
                    (
                        "store",
                        (
                            "sum (max by (population) "
                            '(ray_populace_adapters{population=~"$population",tier="store"}))'
                        ),
                    ),
                ],
            ),
            (
                "Paging",
                "ops",
                "Where the adapters of waves were found, per second.",
                [("{{tier}}", rate("paged_adapters_total", "tier"))],
            ),
            (
                "Waiting for adapters",
                "s",
                "Mean seconds per wave that rollouts waited for adapters' bytes.",
                [
                    (
                        "page",
                        rate("phase_seconds_sum", more='phase="page"')
                        + f" / {rate('waves_total')}",
                    )
                ],
            ),
        ],
    ),
    (
        "Store",
        [
            (
                "Calls",
                "ops",
                "Calls to the object store per second, by operation and outcome.",
                [("{{call}}", f"{rate('store_calls_total', 'call')} > 0.001")],
            ),
            (
                "Latency",
                "s",
                "Mean seconds of a call, all operations.",
                [("mean", f"{rate('store_seconds_total')} / {rate('store_calls_total')}")],
            ),
            (
                "Failed calls",
                "percentunit",
                "Share of calls whose outcome is unknown, unavailable or refused.",
                [
                    (
                        "failed",
                        rate("store_calls_total", more='call=~".*/(unknown|unavailable|refused)"')
                        + f" / {rate('store_calls_total')}",
                    )
                ],
            ),
            (
                "Paused",
                "short",
                "1 while a controller waits for its store.",
                [("{{controller}}", gauge("paused", "max", "controller"))],
            ),
        ],
    ),
    (
        "Health",
        [
            (
                "Mismatch KL",
                "short",
                "KL between rollout and trainer, nats per token.",
                [("{{controller}}", gauge("rollout_kl", "avg", "controller"))],
            ),
            (
                "Masked and out of route",
                "percentunit",
                "Tokens left out because their routing is unknown; selections that the trainer "
                "would have made otherwise.",
                [
                    ("masked", gauge("masked_share", "avg")),
                    ("out of route", gauge("out_of_route", "avg")),
                ],
            ),
            (
                "Partitions",
                "short",
                "Partitions that each controller owns.",
                [("{{controller}}", gauge("partitions", "sum", "controller"))],
            ),
            (
                "Group restarts",
                "short",
                "Restarts of the shard group in the last hour.",
                [("restarts", f"sum (increase(ray_populace_group_restarts_total{OF}[1h]))")],
            ),
        ],
    ),
]


def panel(number: int, x: int, y: int, width: int, found: Panel) -> dict[str, Any]:
    title, unit, description, queries = found
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": 8},
        "fieldConfig": {
            "defaults": {"unit": unit, "min": 0, "custom": {"lineWidth": 1, "fillOpacity": 8}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "expr": query,
                "legendFormat": legend,
                "datasource": DATASOURCE,
            }
            for index, (legend, query) in enumerate(queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    """Everything that Grafana needs; the uid is what Ray's dashboard and links know it by."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
             "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}}
        )  # fmt: skip
        y += 1
        for index, found in enumerate(row):
            panels.append(panel(len(panels) + 1, 8 * (index % 3), y + 8 * (index // 3), 8, found))
        y += 8 * ((len(row) + 2) // 3)
    variables = [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "hide": 0,
            "current": {"text": "Prometheus", "value": "prometheus"},
        },
        {
            "name": "population",
            "label": "Population",
            "type": "query",
            "datasource": DATASOURCE,
            "refresh": 2,
            "query": {
                "query": "label_values(ray_populace_waves_total, population)",
                "refId": "population",
            },
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        },
    ]
    return {
        "uid": "populace",
        "title": "Populace",
        "tags": ["populace", "ray"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": variables},
        "annotations": {"list": []},
        "panels": panels,
    }


def render() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    (HERE / "populace.json").write_text(render())
