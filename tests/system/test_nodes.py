"""Several Ray nodes on this machine: one of them dies without grace, again and again, and nothing
is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from populace.configs.load import load_settings
from populace.configs.schema import Settings
from populace.population.client import Population
from populace.storage.errors import Fenced
from tests.support.accounting import account
from tests.support.heads import ray_nodes
from tests.support.loops import Loop, chat_of, engine_of
from tests.support.streams import experience, open_population, write_config

ROOT = Path(__file__).parents[2]
POPULACE = [sys.executable, "-c", "from populace.population.cli.app import main; main()"]


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A head, where drivers and rewards run, and one more node. Parameter: how often a worker looks
    whether its raylet lives, in milliseconds."""
    quick = {
        "health_check_period_ms": 500, "health_check_failure_threshold": 3,
        "health_check_initial_delay_ms": 0,
        "raylet_death_check_interval_milliseconds": getattr(request, "param", 1000),
    }  # fmt: skip
    with ray_nodes(num_cpus=2, object_store_memory=100_000_000, _system_config=quick) as nodes:
        add_node(nodes)
        yield nodes


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=100_000_000, resources={"second": 10})


@pytest.fixture
def config(bases: dict[str, Path], tmp_path: Path) -> Path:
    shard = {"count": 2, "cpus": 1.0, "timeout_s": 20.0, "max_restarts": 5}
    path, base = tmp_path / "config.yaml", bases["mixtral"]
    return write_config(path, base, "nodes", shard=shard, run={"until_drained": False})


def more_experience(population: Population, number: int) -> int:
    """Three more tasks for each user, with ids of their own."""
    import dataclasses

    events = [
        (
            user,
            [
                dataclasses.replace(task, event_id=f"round-{number}-{task.event_id}")
                for task in tasks[:3]
            ],
        )
        for user, tasks in experience(population.settings)
    ]
    return population.enqueue_many(iter(events))


def records(config: Path) -> int:
    return len(list((config.parent / "store").glob("nodes/revisions/*/*.json")))


def wait_for_records(
    config: Path, at_least: int, process: subprocess.Popen[str], timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while records(config) < at_least:
        assert process.poll() is None, f"the run ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{records(config)} records, not {at_least}"
        time.sleep(0.05)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("num_kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_node_that_dies_in_the_middle_of_a_wave_loses_and_repeats_nothing(
    cluster: Cluster, config: Path, tmp_path: Path, num_kills: int
) -> None:
    seed = int(os.environ.get("POPULACE_TEST_SEED", time.time_ns() % 10**6))
    print(f"kill seed {seed} (set POPULACE_TEST_SEED to repeat)")
    chance = random.Random(seed)
    output = open(tmp_path / "run.log", "w")  # noqa: SIM115
    process = subprocess.Popen(
        [*POPULACE, "run", str(config)], env={**os.environ, "RAY_ADDRESS": cluster.address},
        cwd=ROOT, stdout=output,
        stderr=output, text=True,
    )  # fmt: skip
    recoveries, num_events = [], 50
    try:
        wait_for_records(config, 4, process, 120)
        population = open_population(config)
        for kill in range(num_kills):
            num_events += more_experience(population, kill)
            time.sleep(chance.uniform(0.0, 1.5))
            node = next(node for node in cluster.list_all_nodes() if not node.is_head())
            before, killed_at = records(config), time.monotonic()
            cluster.remove_node(node, allow_graceful=False)
            add_node(cluster)
            # The attempt that died may still have landed; two more records are of the group that
            # came back.
            wait_for_records(config, before + 2, process, 120)
            recoveries.append(time.monotonic() - killed_at)
        deadline = time.monotonic() + 240
        while population.status().pending_events and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "run.log").read_text()
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0, (tmp_path / "run.log").read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    log = (tmp_path / "run.log").read_text()
    print(
        f"{num_kills} nodes killed; until the next records: "
        f"{', '.join(f'{s:.1f} s' for s in recoveries)}"
    )
    assert log.count("a shard died") >= 1, log
    population = open_population(config)
    outcome = account(population)
    assert sum(len(events) for events in outcome.acknowledged.values()) == num_events
    assert outcome.is_exact(), outcome
    assert population.status().pending_events == 0
    for user in population.users():
        assert not population.verify(user).problems


@ray.remote(max_restarts=0)
class OldController:
    """A controller that is about to commit when its node is lost."""

    def __init__(self, config: str, folder: str) -> None:
        population = open_population(Path(config))
        engine = engine_of(population)
        population.ledger.refresh()
        population.ownership.claim(0.4)
        population.ownership._heartbeat.stop()  # type: ignore[union-attr]  # it hangs: no heartbeat any more
        self.folder, train_wave = Path(folder), engine.train_wave

        def train_then_wait(batch: Any) -> Any:
            result = train_wave(batch)
            raylet = os.getppid()
            (self.folder / "trained").touch()
            while os.getppid() == raylet:
                time.sleep(0.001)
            return result

        engine.train_wave = train_then_wait  # type: ignore[method-assign]
        self.loop = Loop(population, engine, chat_of(population))

    def pid(self) -> int:
        return os.getpid()

    def wave(self) -> None:
        try:
            self.loop.wave()
            outcome = "committed"
        except Fenced as error:
            outcome = f"fenced: {error}"
        # Whole or not there: somebody waits for it to appear.
        (self.folder / ".outcome").write_text(outcome)
        (self.folder / ".outcome").rename(self.folder / "outcome")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cluster", [100_000], indirect=True)
def test_an_actor_that_outlives_its_raylet_is_fenced(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    ray.init(cluster.address, logging_level="error", log_to_driver=False)
    settings: Settings = load_settings(config)
    population = Population.create(settings.store, settings)
    population.enqueue_many(experience(settings))
    old = OldController.options(resources={"second": 1}).remote(str(config), str(tmp_path))
    pid = ray.get(old.pid.remote())
    old.wave.remote()
    wait_for(tmp_path / "trained", 60)
    population.ledger.refresh()
    node = next(node for node in cluster.list_all_nodes() if not node.is_head())
    population.ownership.claim(0.2)
    node.kill_raylet()
    os.kill(pid, 0)
    wait_for(tmp_path / "outcome", 30)
    assert (tmp_path / "outcome").read_text().startswith("fenced"), (
        tmp_path / "outcome"
    ).read_text()
    population.ledger.refresh()
    assert population.ledger.catalog.num_updated() == 0, "nothing of the old one is there"
    population.ownership.release()
    os.kill(pid, signal.SIGKILL)


def wait_for(path: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.01)
