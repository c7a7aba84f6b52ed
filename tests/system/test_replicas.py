"""Several groups under one run, on a real Ray whose GPUs are pretended: resources that Ray hands
out and nothing computes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from populace.configs.schema import Settings
from populace.population.experience.events import Task
from populace.population.watching.beacon import controllers_of
from populace.population.watching.stop import stop_run
from populace.workers.actors.places import NAMESPACE
from tests.support.accounting import account
from tests.support.heads import ray_nodes
from tests.support.streams import experience, open_population, write_config

ROOT = Path(__file__).parents[2]
POPULACE = [sys.executable, "-c", "from populace.population.cli.app import main; main()"]


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a node with eight GPUs, as far as Ray knows."""
    with ray_nodes(num_cpus=4, num_gpus=8, object_store_memory=200_000_000) as node:
        ray.init(node.address, logging_level="error", log_to_driver=False)
        yield node.address


@contextmanager
def running(
    config: Path, address: str, log: Path, *overrides: str
) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own, which is gone afterwards."""
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*POPULACE, "run", str(config), *overrides, "--log", "json"],
            env={**os.environ, "RAY_ADDRESS": address}, cwd=ROOT, stdout=output, stderr=output,
            text=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def said(log: Path) -> list[dict[str, Any]]:
    """What a run said so far."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def texts(events: list[dict[str, Any]]) -> list[str]:
    return [event["text"] for event in events if event["event"] == "stage"]


def waves_of(events: list[dict[str, Any]]) -> list[str]:
    """Whose waves they were, in their order."""
    return [event["controller"] for event in events if event["event"] == "wave"]


def place_of(events: list[dict[str, Any]], text: str) -> int:
    return next(n for n, event in enumerate(events) if text in event.get("text", ""))


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def shards() -> dict[str, str]:
    """Controller -> name of the only shard of its group."""
    names = [item["name"] for item in ray.util.list_named_actors(all_namespaces=True)]
    return {name.split("/")[1]: name for name in names if "/shard-" in name}


def kill(shard: str) -> None:
    actor = ray.get_actor(shard, namespace=NAMESPACE)
    os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)


def kill_follower() -> None:
    """The process of a controller; its group has one of its own."""
    (process,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [""])[0].startswith("ray::Follower")
    )
    process.kill()


def owned(events: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Controller -> the partitions that it said last it owns."""
    pattern = re.compile(r"(?:(main\.\d): )?this controller owns partitions (.*)")
    found = [match for text in texts(events) if (match := pattern.fullmatch(text))]
    return {match[1] or "main": json.loads(match[2]) for match in found}


def many(settings: Settings) -> Iterator[tuple[str, list[Task]]]:
    return experience(settings, num_users=48, num_tasks=10)


def few(settings: Settings) -> Iterator[tuple[str, list[Task]]]:
    return experience(settings, num_users=24, num_tasks=8)


def config_of(tmp_path: Path, base: Path, name: str, events: str, partitions: int) -> Path:
    return write_config(
        tmp_path / "config.yaml", base, name, partitions=partitions,
        experience=f"tests.system.test_replicas:{events}", shard={"cpus": 0.1},
        evaluation={"every_waves": 1000}, run={"takeover_s": 10.0}, scheduler={"slots": 32},
    )  # fmt: skip


def assert_exact(config: Path, num_events: int) -> None:
    population = open_population(config)
    outcome = account(population)
    assert sum(len(events) for events in outcome.acknowledged.values()) == num_events
    assert outcome.is_exact(), outcome
    assert population.status().pending_events == 0
    assert not population.verify("user-0").problems


@pytest.mark.timeout(900)
def test_eight_groups_share_the_users_and_one_that_dies_holds_up_its_own_alone(
    gpus: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(tmp_path, bases["qwen3_moe"], "eight", "many", 16)
    log = tmp_path / "run.log"
    with running(config, gpus, log) as process:
        wait_until(lambda: len(set(waves_of(said(log)))) == 8, process, log)
        kill(shards()["main.3"])
        assert process.wait(300) == 0, log.read_text()
    events = said(log)
    died = place_of(events, "main.3: a shard died")
    back = place_of(events, "main.3: the group is back after")
    meanwhile = waves_of(events[died:back])
    assert meanwhile and "main.3" not in meanwhile, "the others went on"
    assert "main.3" in waves_of(events[back:]), "and so did its users"
    partitions = owned(events[:died])
    assert len(partitions) == 8 and {len(own) for own in partitions.values()} == {2}
    assert sorted(number for own in partitions.values() for number in own) == list(range(16))
    assert "8 groups share the partitions" in texts(events)
    assert sum("although Ray reserved GPUs" in text for text in texts(events)) >= 8
    assert_exact(config, 480)
    assert not shards(), "every group is gone"
    assert ray.available_resources()["GPU"] == 8


@pytest.mark.timeout(900)
def test_what_a_killed_run_left_is_adopted_or_removed_by_the_next_one(
    gpus: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """And the next one, whose follower's process is killed, too, reports on everybody."""
    config = config_of(tmp_path, bases["qwen3_moe"], "left", "few", 4)
    log, second, folder = tmp_path / "run.log", tmp_path / "second.log", tmp_path / "report"
    quick = "run.takeover_s=4"
    with running(config, gpus, log, "shard.replicas=3", quick) as process:
        wait_until(lambda: len(set(waves_of(said(log)))) == 3, process, log)
    assert shards().keys() == {"main", "main.1", "main.2"}, "the groups outlive their drivers"
    own = ("shard.replicas=2", quick, f"report={folder}")
    with running(config, gpus, second, *own) as process:
        wait_until(lambda: "main.1" in waves_of(said(second)), process, second)
        population = open_population(config)
        seen = {seen.name for seen in controllers_of(population.store, "left")}
        kill_follower()
        assert process.wait(300) == 0, second.read_text()
    assert_exact(config, 192)
    # Who was adopted doesn't load again, and so doesn't say what it computes on.
    events = said(second)
    assert not any("shards compute on" in text for text in texts(events))
    assert {"main", "main.1"} >= set(waves_of(events))
    assert "the process of main.1 died; starting it again" in texts(events)
    assert {"main", "main.1"} <= seen, "each shows figures of its own"
    assert not shards()
    ledger = population.ledger
    ledger.refresh()
    examined = {name for p, name in ledger.users().items() if len(ledger.pending.heldout(p))}
    report = json.loads((folder / "report.json").read_text())
    assert len(examined) > 10 and set(report["users"]) == examined


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_follower_that_is_stopped_leaves_its_users_to_the_others(
    gpus: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(tmp_path, bases["qwen3_moe"], "less", "few", 4)
    log = tmp_path / "run.log"
    with running(config, gpus, log, "shard.replicas=2", "run.takeover_s=4") as process:
        wait_until(lambda: "main.1" in waves_of(said(log)), process, log)
        population = open_population(config)
        assert stop_run(population.store, "less", controller="main.1", timeout_s=120) == {
            "main.1": "stopped"
        }
        assert process.wait(300) == 0, log.read_text()
    assert_exact(config, 192)
    assert not shards()


def test_fewer_partitions_than_groups_are_refused_with_the_way_out(
    gpus: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    config, log = config_of(tmp_path, bases["qwen3_moe"], "few", "few", 4), tmp_path / "run.log"
    with running(config, gpus, log) as process:
        assert process.wait(120) == 2
    text = " ".join(log.read_text().split())
    assert "shard.replicas is auto, and 8 GPUs for shard.count=1 make that 8" in text
    assert "created with 4; set shard.replicas=4 or less, or create a population with" in text
    assert not list((tmp_path / "store").glob("few/owners/*")), "nobody claimed anything"
