"""A population as its operators see it: a submitted job, stopped and continued from elsewhere;
Prometheus, alerts and dashboards on a real run; the population page in a real browser."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from populace.population.client import Population
from populace.population.experience.events import Task
from populace.population.watching.beacon import controllers_of
from populace.population.watching.figures import METRICS
from populace.storage.objects.open import open_store
from tests.support.accounting import account
from tests.support.browser import chromium
from tests.support.heads import DASHBOARD, ROOT, TOKEN, ask, on_head, ray_head, submit
from tests.support.streams import WORDS, open_population, wait_until, write_config

ORIGIN = "http://127.0.0.1:28270"
PAGE = f"{ORIGIN}/operated"
PROMETHEUS = "http://127.0.0.1:28090"
PAGE_TOKEN = "the-token-of-this-page"
POPULACE = str(Path(sys.executable).parent / "populace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A submitted run that waits for experience."""

    config: Path
    head: dict[str, str]

    @property
    def population(self) -> Population:
        return open_population(self.config)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A `populace` command on another machine: with the store and the keys, without Ray."""
        environment = {**os.environ, "POPULACE_STORE": f"file://{self.config.parent}/store"}
        return subprocess.run(
            [POPULACE, *words], env=environment, capture_output=True, text=True, timeout=120
        )

    def status(self, name: str) -> str:
        found: str = json.loads(ask(f"/api/jobs/{name}"))["status"]
        return found


@pytest.fixture(scope="module")
def job(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """`ray job submit` of a run that serves its page; some talk to it all the time, one has a
    broken reward."""
    folder = tmp_path_factory.mktemp("operated")
    config = write_config(
        folder / "config.yaml",
        bases["mixtral"],
        "operated",
        run={"until_drained": False},
        page={"enabled": True, "port": 28270},
        rewards={
            "functions": {
                "letters": "tests.support.rewards:letters",
                "raising": "tests.support.rewards:raising",
            }
        },
    )
    variables = {"POPULACE_PAGE_TOKEN": PAGE_TOKEN, "RAY_metrics_report_interval_ms": "1000"}
    with ray_head(folder, **variables) as head:
        done = submit(head, "run", str(config), flags=("--no-wait", "--submission-id", "first"))
        assert done.returncode == 0, done.stderr
        job = Job(config=config, head=head)
        wait_for(lambda: waves(job) >= 2, "the first waves")
        stop = threading.Event()
        talker = threading.Thread(target=talk, args=(job.population, stop))
        talker.start()
        try:
            yield job
        finally:
            stop.set()
            talker.join()


def talk(population: Population, stop: threading.Event) -> None:
    """A few new tasks every second, one of them with a reward that raises."""
    number = 0
    while not stop.wait(1.0):
        number += 1
        words = f"{WORDS[number % len(WORDS)]} {WORDS[number * 5 % len(WORDS)]}"
        for user in ("user-0", "user-1", "user-2"):
            population.enqueue(
                user, [Task(event_id=f"more-{number}", prompt=words, reward="letters")]
            )
        population.enqueue(
            "broken", [Task(event_id=f"more-{number}", prompt=words, reward="raising")]
        )


def waves(job: Job) -> int:
    store = open_store(f"file://{job.config.parent}/store")
    return sum(seen.figures.counts.get("waves", 0) for seen in controllers_of(store, "operated"))


wait_for = functools.partial(wait_until, timeout_s=120.0, pause_s=0.5)


@pytest.fixture(scope="module")
def prometheus(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Debian's Prometheus with our configuration and rules, looking every second."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((ROOT / "infra/prometheus/prometheus.yaml").read_text())
    config["global"] |= {
        "scrape_interval": "1s",
        "scrape_timeout": "1s",
        "evaluation_interval": "1s",
    }
    config["rule_files"] = [str(ROOT / "infra/prometheus/rules.yaml")]
    targets = f"{job.head['RAY_TEMPORARY']}/prom_metrics_service_discovery.json"
    (ray,) = [scrape for scrape in config["scrape_configs"] if "file_sd_configs" in scrape]
    ray["file_sd_configs"][0]["files"] = [targets]
    config["scrape_configs"] = [ray]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [
        binary,
        f"--config.file={folder}/prometheus.yaml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={PROMETHEUS.removeprefix('http://')}",
    ]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: "ray_populace_waves_total" in names_known(), f"metrics; see {folder}/log")
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)


def query(path: str, **parameters: str) -> Any:
    address = f"{PROMETHEUS}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(address, timeout=10) as answer:
        body = json.loads(answer.read())
    assert body["status"] == "success", body
    return body["data"]


def names_known() -> list[str]:
    try:
        names: list[str] = query("label/__name__/values")
        return names
    except OSError:
        return []


def test_prometheus_sees_every_metric_of_the_table(job: Job, prometheus: None) -> None:
    suffixes = {"counter": "_total", "gauge": "", "histogram": "_count"}
    wanted = {f"ray_{metric.name}{suffixes[metric.kind]}" for metric in METRICS}
    wait_for(lambda: wanted <= set(names_known()), f"one of {sorted(wanted - set(names_known()))}")
    for metric in METRICS:
        name = f"ray_{metric.name}{suffixes[metric.kind]}"
        series = [item["metric"] for item in query("query", query=name)["result"]]
        assert all(
            item["population"] == "operated" and item["controller"] == "main" for item in series
        ), name
        if metric.tag:
            assert {item[metric.tag] for item in series} <= set(metric.values), name


def test_every_panel_of_the_dashboard_returns_data(job: Job, prometheus: None) -> None:
    dashboard = json.loads((ROOT / "infra/grafana/populace.json").read_text())
    targets = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    assert len(targets) > 20
    missing = set(targets)

    def look() -> bool:
        for expression in list(missing):
            filled = expression.replace("$__rate_interval", "30s").replace(
                "$population", "operated"
            )
            if any(item["value"][1] != "NaN" for item in query("query", query=filled)["result"]):
                missing.remove(expression)
        return not missing

    wait_for(look, "data for a panel")


def test_every_alert_evaluates_and_parked_events_make_one_fire(job: Job, prometheus: None) -> None:
    def fires() -> bool:
        alerts = query("alerts")["alerts"]
        return any(
            alert["labels"]["alertname"] == "PopulaceParkedEvents" and alert["state"] == "firing"
            for alert in alerts
        )

    wait_for(fires, "alert about parked events")
    (group,) = query("rules")["groups"]
    assert len(group["rules"]) >= 10
    assert {rule["health"] for rule in group["rules"]} == {"ok"}, group
    quiet = [rule["name"] for rule in group["rules"] if rule["state"] == "inactive"]
    assert "PopulaceStoreDown" in quiet and "PopulaceNotTraining" in quiet


def test_top_shows_the_run_to_whoever_sees_the_store(job: Job) -> None:
    shown = job.command("top", "--once", "--name", "operated")
    assert shown.returncode == 0, shown.stderr
    assert "training" in shown.stdout or "idle" in shown.stdout
    assert "revisions / min" in shown.stdout
    (seen,) = json.loads(job.command("top", "--json").stdout)
    assert seen["figures"]["counts"]["waves"] >= 2
    assert seen["figures"]["residency"]["store"] >= 5


def test_the_page_shows_a_users_history_and_rolls_back_with_the_token_only(job: Job) -> None:
    with chromium() as tab:
        page = tab.page
        page.goto(f"{PAGE}/")
        page.wait_for_selector("#controllers >> text=main")
        page.fill("input[name=id]", "user-0")
        page.click("text=Search")
        assert page.title().startswith("user-0")
        assert page.locator(".tree circle").count() >= 2
        assert page.locator(".tree circle.tip").count() == 1
        tip = int(page.locator("dt:text-is('tip') + dd").inner_text())
        assert page.locator("text=Roll back").count() == 0, "nobody has signed in"
        post = "{method: 'POST', body: new URLSearchParams({id: 'user-0', to: '0'})}"
        refused = page.evaluate(f"async () => (await fetch('rollback', {post})).status")
        assert refused == 403
        tab.errors.clear()  # the browser names the refusal

        page.click("text=Compare")
        page.wait_for_selector(".diff td:has-text('q_proj')")
        page.goto(f"{PAGE}/manifest?id=user-0&revision=1")
        assert "https://slsa.dev/provenance/v1" in page.content()

        page.goto(f"{PAGE}/sign-in")
        page.fill("input[name=token]", "wrong-wrong-wrong-wrong")
        page.click("main >> text=Sign in >> nth=-1")
        assert "not the page's token" in page.content()
        tab.errors.clear()
        page.goto(f"{PAGE}/sign-in")
        page.fill("input[name=token]", PAGE_TOKEN)
        page.click("main button")
        page.goto(f"{PAGE}/user?id=user-0")
        oldest = page.locator("form.rollback").last  # that the retention rule has left
        to = oldest.locator("input[name=to]").input_value()
        oldest.locator("button").click()
        assert f"Roll user-0 back to revision {to}?" in page.inner_text("h1")
        page.click("button.danger")
        assert f"revision {to}" in page.inner_text(".message")
        assert int(to) < tip

        def is_obeyed() -> bool:
            page.goto(f"{PAGE}/user?id=user-0")
            return page.locator(".mark.rollback").count() > 0

        wait_for(is_obeyed, "verdict about the rollback")
        page.goto(f"{PAGE}/user?id=broken")
        wait_for(
            lambda: bool(page.reload()) and "this reward is broken" in page.content(),
            "parked event",
        )
        assert tab.addresses == {"127.0.0.1:28270"}
        assert not tab.errors


def test_a_page_of_another_site_can_neither_act_nor_be_that_site(job: Job) -> None:
    def post(**headers: str) -> int:
        request = urllib.request.Request(
            f"{PAGE}/sign-in", data=f"token={PAGE_TOKEN}".encode(), headers=headers
        )
        try:
            return int(urllib.request.urlopen(request, timeout=10).status)
        except urllib.error.HTTPError as error:
            return error.code

    assert post() == 403, "no origin"
    assert post(Origin="http://evil.example") == 403
    assert post(Origin="http://evil.example", Host="evil.example") == 403, (
        "a name that was pointed here"
    )
    assert post(Origin=ORIGIN) == 200


def test_a_second_run_of_the_name_is_refused_with_the_reason(job: Job) -> None:
    done = submit(job.head, "run", str(job.config), flags=("--submission-id", "second"))
    assert done.returncode != 0
    assert "is being run by another process" in done.stdout
    assert "run.controller=NAME" in done.stdout
    assert job.status("second") == "FAILED"
    assert "exit code 2" in json.loads(ask("/api/jobs/second"))["message"]
    assert job.status("first") == "RUNNING"
    assert urllib.request.urlopen(f"{PAGE}/live.json", timeout=10).status == 200, "its page stays"


def test_rays_dashboard_shows_the_job_in_a_browser(job: Job) -> None:
    with chromium() as tab:
        tab.page.goto(f"{DASHBOARD}/#/jobs")
        tab.page.fill("input[type=password]", TOKEN)
        tab.page.click("text=Submit")
        tab.page.locator("tr:has-text('first') a").first.click()
        tab.page.wait_for_selector("text=RUNNING")
        tab.page.wait_for_selector("text=populace run")


@pytest.mark.timeout(400)
def test_a_job_is_stopped_from_elsewhere_and_a_new_one_continues(job: Job) -> None:
    stopped = job.command("stop", "operated")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "main: stopped" in stopped.stdout
    wait_for(lambda: job.status("first") == "SUCCEEDED", "end of the job")
    assert "asked to stop" in json.loads(ask("/api/jobs/first/logs"))["logs"]
    assert not job.population.status().running
    nothing = job.command("stop", "operated")
    assert nothing.returncode == 2 and "nothing runs" in nothing.stderr
    time.sleep(2.0)  # whatever is still enqueued
    done = subprocess.run(
        [
            POPULACE,
            "run",
            str(job.config),
            "run.until_drained=true",
            "page.enabled=false",
            "--log",
            "json",
        ],
        env=on_head(job.head),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {"stage", "wave"} <= {event["event"] for event in events}
    assert account(job.population).is_exact() or job.population.status().pending_events > 0
