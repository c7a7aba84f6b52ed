"""What a run tells about itself: counted store calls, figures of waves, live figures in the store,
stopping."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.experience.events import Task
from populace.population.watching.beacon import (
    Beacon,
    ControllerFigures,
    SeenController,
    controllers_of,
)
from populace.population.watching.figures import (
    METRICS,
    call_figures,
    state_figures,
    wave_figures,
)
from populace.population.watching.metrics import RayMetrics
from populace.population.watching.rates import Watch
from populace.population.watching.stop import stop_run
from populace.population.watching.views import LogView, View, Views
from populace.population.waves.report import RunState, WaveReport
from populace.storage import paths
from populace.storage.errors import AlreadyExists, InvalidInput, ObjectNotFound, StoreUnavailable
from populace.storage.objects.cloud import MemoryStore
from populace.storage.objects.counted import CountedStore, add_calls
from tests.support.loops import Loop, run_to_the_end
from tests.support.streams import experience, make_population, wait_until

ROOT = Path(__file__).parents[3]


def test_a_counted_store_counts_every_call_by_what_came_of_it() -> None:
    store = CountedStore(MemoryStore())
    store.create("a/1", b"x")
    store.put("a/2", b"y")
    assert store.get("a/1") == b"x" and store.head("a/2") == 1
    assert list(store.list("a")) == ["a/1", "a/2"] and store.folders() == ["a"]
    with pytest.raises(AlreadyExists):
        store.create("a/1", b"z")
    with pytest.raises(ObjectNotFound):
        store.get("b")
    store.delete("a/1")
    counts = {what: count for what, (count, _) in store.take_calls().items()}
    assert counts == {
        ("create", "ok"): 1,
        ("put", "ok"): 1,
        ("get", "ok"): 1,
        ("head", "ok"): 1,
        ("list", "ok"): 2,
        ("create", "exists"): 1,
        ("get", "absent"): 1,
        ("delete", "ok"): 1,
    }
    assert store.take_calls() == {}, "taken once"
    total = add_calls(
        [{("get", "ok"): (2, 0.5)}, {("get", "ok"): (1, 0.25), ("put", "ok"): (1, 0.1)}]
    )
    assert total == {("get", "ok"): (3, 0.75), ("put", "ok"): (1, 0.1)}


@pytest.fixture
def watched(settings: Settings, start: Callable[..., Loop]) -> tuple[Loop, list[WaveReport]]:
    """A controller after its waves: with a broken reward, a rollback and a forgetting."""
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=4, num_tasks=6))
    # Some of them are held out.
    population.enqueue(
        "broken",
        [Task(event_id=f"b{number}", prompt="sea", reward="raising") for number in range(4)],
    )
    controller = start(population)
    reports = run_to_the_end(controller)
    other = Population.open(population.store, settings)
    other.rollback("user-0", 1)
    other.forget("user-3")
    other.enqueue(
        "user-0",
        [
            Task(event_id=f"again-{number}", prompt="sea quiet", reward="letters")
            for number in range(6)
        ],
    )
    return controller, [*reports, *run_to_the_end(controller)]


def test_the_figures_of_waves_add_up_to_what_the_catalog_knows(
    watched: tuple[Loop, list[WaveReport]],
) -> None:
    controller, reports = watched
    sums: dict[tuple[str, str], float] = {}
    for report in reports:
        for figure in wave_figures(report):
            sums[figure.name, figure.tag] = sums.get((figure.name, figure.tag), 0) + figure.value
    catalog = controller.ledger.catalog
    decisions = catalog.count_decisions()
    assert sums["populace_waves", ""] == len(reports) == controller.num_waves
    assert sums["populace_adapter_changes", "committed"] == catalog.revisions.size
    assert sums["populace_adapter_changes", "promote"] == decisions["promote"]
    assert sums["populace_adapter_changes", "rollback"] == decisions["rollback"] == 1
    assert sums["populace_adapter_changes", "forgotten"] == 1
    assert 1 <= sums["populace_settled_events", "parked"] <= 4
    settled = sum(value for (name, _), value in sums.items() if name == "populace_settled_events")
    assert settled == catalog.num_settled.total()
    trained = sum(
        state.num_trained
        for adapter in catalog
        for state in catalog.revisions_of(adapter.pseudonym)
    )
    assert sums["populace_trained_events", ""] >= trained > 0, (
        "the forgotten user's revisions aren't listed any more"
    )
    state = {
        (figure.name, figure.tag): figure.value for figure in state_figures(controller.state())
    }
    assert state["populace_pending_events", ""] == 0 and state["populace_partitions", ""] == 2
    assert (
        0
        < max(value for (name, _), value in sums.items() if name == "populace_step_efficiency")
        / len(reports)
        < 1
    )


def test_every_figure_is_of_a_metric_in_the_table_and_of_a_tag_that_it_names(
    watched: tuple[Loop, list[WaveReport]],
) -> None:
    controller, reports = watched
    known = {metric.name: metric for metric in METRICS}
    figures = [figure for report in reports for figure in wave_figures(report)]
    figures += [
        *state_figures(controller.state()),
        *call_figures({("get", "ok"): (1, 0.1), ("list", "refused"): (1, 0.1)}),
    ]
    for figure in figures:
        metric = known[figure.name]
        assert figure.tag in metric.values if metric.tag else not figure.tag, figure
    assert all(len(metric.values) <= 50 for metric in METRICS), "tags are bounded"
    assert len(known) == len(METRICS)


def test_gauges_are_said_again_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, float]] = []

    class Exported:
        def __init__(self, name: str) -> None:
            self.name = name

        def set_default_tags(self, tags: dict[str, str]) -> None:
            assert tags == {"population": "people", "controller": "main"}

        def inc(self, value: float, tags: dict[str, str] | None) -> None:
            said.append((self.name, value))

        set = observe = inc

    monkeypatch.setattr(
        "populace.population.watching.metrics._export", lambda metric: Exported(metric.name)
    )
    monkeypatch.setattr("populace.population.watching.metrics.KEEP_S", 0.05)
    with RayMetrics("people", "main", dict) as metrics:
        metrics.paused(StoreUnavailable("it is away"))
        wait_until(lambda: said.count(("populace_paused", True)) > 3, "a repetition")
        assert said.count(("populace_pauses", True)) == 1, "a counter is not counted again"
        metrics.paused(None)
        wait_until(lambda: said.count(("populace_paused", False)) > 3, "a repetition")
    num_said = len(said)
    time.sleep(0.2)
    assert len(said) == num_said


def test_log_lines_are_json_and_one_per_wave(
    watched: tuple[Loop, list[WaveReport]], capsys: pytest.CaptureFixture[str]
) -> None:
    controller, reports = watched
    view = LogView()
    view.stage("a stage with [brackets]")
    view.wave(reports[0], controller.state())
    stage, wave = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (stage["event"], stage["text"]) == ("stage", "a stage with [brackets]")
    assert (
        wave["event"] == "wave"
        and wave["adapters"] == reports[0].num_adapters
        and "rollout" in wave["seconds"]
    )


def test_live_figures_lie_beside_the_heartbeats(
    settings: Settings, start: Callable[..., Loop]
) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=3, num_tasks=4))
    ledger = population.ledger
    controller = start(population)
    beacon = Beacon(population.ownership.show)
    population.ownership.join("main", 0.4)
    for report in run_to_the_end(controller):
        beacon.wave(report, controller.state())
    try:

        def states() -> list[str]:
            return [seen.figures.state for seen in controllers_of(population.store, "test")]

        wait_until(lambda: states() == ["training"], "a heartbeat with figures")
        (seen,) = controllers_of(population.store, "test")
        assert seen.name == "main"
        assert seen.figures.counts["committed"] == ledger.catalog.revisions.size > 0
        assert (
            seen.figures.residency["store"] == 3
            and len(seen.figures.hot) == seen.figures.residency["hot"]
        )
        beacon.idle(controller.state())
        wait_until(lambda: states() == ["idle"], "a newer one")
    finally:
        population.ownership.release()
    assert controllers_of(population.store, "test") == []


def seen_at(waves: int, beat: str, uptime_s: float = 0.0) -> SeenController:
    figures = ControllerFigures(counts={"waves": waves}, uptime_s=uptime_s)
    return SeenController(
        name="main", owner="host/1/a", beat=beat, at_s=time.time(), figures=figures
    )


def test_rates_are_those_of_the_last_minute_and_silence_is_told() -> None:
    watch = Watch()
    (first,) = watch.look([seen_at(30, "a", uptime_s=60.0)], now_s=0.0)
    assert first.per_s == {"waves": 0.5}, "of a first look, since the start"
    (later,) = watch.look([seen_at(50, "b")], now_s=10.0)
    assert later.per_s == {"waves": 2.0} and not later.is_silent
    for second in range(11, 80):
        (later,) = watch.look([seen_at(50 + second, str(second))], now_s=float(second))
    assert later.per_s["waves"] == pytest.approx(1.0), "what was before the window doesn't count"
    (silent,) = watch.look([seen_at(129, "79")], now_s=90.0)
    assert silent.is_silent
    assert watch.look([], now_s=91.0) == []
    long_ago = dataclasses.replace(seen_at(129, "79"), at_s=time.time() - 3600)
    assert watch.look([long_ago], now_s=92.0)[0].is_silent, "a first look tells, too"


def test_what_a_view_raises_ends_nothing(watched: tuple[Loop, list[WaveReport]]) -> None:
    class Broken(View):
        def wave(self, report: WaveReport, state: RunState) -> None:
            raise RuntimeError("a metric that can't be")

    class Counting(View):
        num_waves = 0

        def wave(self, report: WaveReport, state: RunState) -> None:
            self.num_waves += 1

    controller, reports = watched
    counting = Counting()
    views = Views(Broken(), counting)
    for report in reports:
        views.wave(report, controller.state())
    assert counting.num_waves == len(reports)


def test_a_pause_after_a_wave_leaves_the_heartbeats_readable(
    watched: tuple[Loop, list[WaveReport]],
) -> None:
    controller, reports = watched
    shown: list[str] = []
    beacon = Beacon(lambda figures: shown.append(json.dumps(figures)))
    beacon.wave(reports[0], controller.state())
    beacon.paused(StoreUnavailable("it is away"))
    beacon.paused(None)
    beacon.decided([record for report in reports for record in report.answered])
    beacon.idle(controller.state())
    states = [json.loads(figures)["state"] for figures in shown]
    assert states == ["training", "paused", "starting", "idle"]
    assert json.loads(shown[-1])["counts"]["forgotten"] == 1


def test_a_damaged_heartbeat_hides_nobody_else() -> None:
    store = MemoryStore()
    show(store, "good", "a")
    store.put(paths.controller("pop", "bad"), b'{"owner": "x"}')
    store.put(paths.controller("pop", "worse"), b"{")
    assert [seen.name for seen in controllers_of(store, "pop")] == ["good"]


def test_a_run_is_asked_to_stop_through_the_store(settings: Settings) -> None:
    population = Population.create(MemoryStore(), settings)
    ownership, asked = population.ownership, threading.Event()
    ownership.join("main", 0.4, asked.set)
    # What an earlier run of this name was asked isn't meant for this one.
    population.store.put(
        paths.stop_request("test", "main"), json.dumps({"owner": "somebody else"}).encode()
    )
    assert not asked.wait(0.5)

    def run() -> None:
        assert asked.wait(10)
        time.sleep(0.5)  # the wave
        ownership.release()

    thread = threading.Thread(target=run)
    thread.start()
    assert stop_run(population.store, "test") == {"main": "stopped"}
    thread.join()
    assert list(population.store.list("test/controllers")) == []
    with pytest.raises(InvalidInput, match="nothing runs"):
        stop_run(population.store, "test")


def test_stopping_a_run_that_is_dead_or_too_busy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("populace.population.watching.stop.DEAD_S", 1.0)
    store = MemoryStore()
    make_population(store)
    show(store, "main", "a")
    with pytest.raises(InvalidInput, match="no controller 'other'"):
        stop_run(store, "pop", controller="other")
    assert stop_run(store, "pop") == {"main": "dead"}
    assert json.loads(store.get(paths.stop_request("pop", "main")))["owner"] == "me", (
        "should it only have slept"
    )

    beats = threading.Event()

    def beat() -> None:
        number = 0
        while not beats.wait(0.2):
            number += 1
            show(store, "main", f"b{number}")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert stop_run(store, "pop", timeout_s=2.0) == {"main": "busy"}
        assert json.loads(store.get(paths.stop_request("pop", "main")))["owner"] == "me", (
            "it still shall"
        )
    finally:
        beats.set()
        thread.join()


def show(store: MemoryStore, controller: str, nonce: str) -> None:
    body = {"owner": "me", "nonce": nonce, "at": time.time()}
    store.put(paths.controller("pop", controller), json.dumps(body).encode())


def test_every_alert_fires_on_what_it_is_about_and_not_before(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    rules = yaml.safe_load((ROOT / "infra/prometheus/rules.yaml").read_text())["groups"][0]["rules"]
    waves = ("waves_total", "", "0+1x60")
    cases = {
        "PopulaceBacklogOld": [("oldest_wait_seconds", "", "0x20 1000x40")],
        "PopulaceNotTraining": [
            ("pending_events", "", "0x20 5x40"),
            ("waves_total", "", "0+1x20 21x40"),
        ],
        "PopulaceStoreDown": [("paused", "", "0x20 1x40")],
        "PopulaceStoreErrors": [
            ("store_calls_total", 'call="get/ok"', "0+60x60"),
            ("store_calls_total", 'call="put/unknown"', "0x20 10+30x40"),
        ],
        "PopulaceCommitFailures": [("pauses_total", "", "0x20 1+1x40")],
        "PopulaceRejectRate": [
            ("adapter_changes_total", 'change="promote"', "0+1x60"),
            ("adapter_changes_total", 'change="reject"', "0x20 2+2x40"),
        ],
        "PopulaceRunGone": [("pending_events", "", "5x30 stale")],
        "PopulaceMismatch": [("rollout_kl", "", "0.001x20 0.2x40"), waves],
        "PopulaceMaskedTokens": [("masked_share", "", "0x20 0.5x40"), waves],
        "PopulaceParkedEvents": [("settled_events_total", 'reason="parked"', "0x20 1x40")],
        "PopulaceGroupRestarts": [("group_restarts_total", "", "0x20 5x40")],
    }
    assert cases.keys() == {rule["alert"] for rule in rules}
    tests = []
    for alert, series in cases.items():
        labels = 'population="p",controller="main"'
        inputs = [
            {
                "series": f"ray_populace_{name}{{{','.join(filter(None, (labels, own)))}}}",
                "values": values,
            }
            for name, own, values in series
        ]
        tests.append(
            {"interval": "1m", "input_series": inputs, "promql_expr_test": counted(alert, 15, 0)}
        )
        tests.append(
            {"interval": "1m", "input_series": inputs, "promql_expr_test": counted(alert, 58, 1)}
        )
    for idle in (
        "PopulaceMismatch",
        "PopulaceMaskedTokens",
    ):  # what the last wave left is no news for ever
        inputs = [
            {"series": f'ray_populace_{name}{{population="p",controller="main"}}', "values": values}
            for name, values in (
                ("rollout_kl", "0.2x60"),
                ("masked_share", "0.5x60"),
                ("waves_total", "0+1x5 5x55"),
            )
        ]
        tests.append(
            {"interval": "1m", "input_series": inputs, "promql_expr_test": counted(idle, 58, 0)}
        )
    (tmp_path / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": [str(ROOT / "infra/prometheus/rules.yaml")], "tests": tests})
    )
    done = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def counted(alert: str, minute: int, firing: int) -> list[dict[str, Any]]:
    """How many alerts of that name fire then."""
    samples = [{"labels": "{}", "value": 1}] if firing else []
    expression = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    return [{"expr": expression, "eval_time": f"{minute}m", "exp_samples": samples}]
