"""On a real Ray: the command, rewards with a time limit, kill -9, and a submitted job."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from populace.configs.load import load_settings
from populace.configs.schema import StreamSettings
from populace.population.client import Population
from populace.population.experience.events import Demonstration, Task
from populace.population.experience.gateway import Gateway
from populace.population.experience.sealing import Reason
from populace.population.waves.reward_tasks import score_on_ray
from populace.population.waves.rewards import Reply, RewardRequest
from populace.storage.errors import Forgotten, InvalidInput, Overloaded
from populace.storage.identity import PopulationMeta
from populace.storage.objects.files import FileStore
from tests.support.accounting import account
from tests.support.heads import on_head, ray_head, ray_here, submit
from tests.support.loops import ledger_of
from tests.support.streams import experience, make_population, open_population, write_config

ROOT = Path(__file__).parents[2]
POPULACE = [sys.executable, "-c", "from populace.population.cli.app import main; main()"]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with ray_head(tmp_path_factory.mktemp("ray")) as environment:
        yield environment


@pytest.fixture
def config(bases: dict[str, Path], tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml", bases["mixtral"], "ray")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_kills", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_at_a_random_moment_loses_nothing_and_trains_nothing_twice(
    head: dict[str, str], config: Path, tmp_path: Path, num_kills: int
) -> None:
    environment = on_head(head)
    seed = int(os.environ.get("POPULACE_TEST_SEED", time.time_ns() % 10**6))
    print(f"kill seed {seed} (set POPULACE_TEST_SEED to repeat)")
    chance = random.Random(seed)
    log = open(tmp_path / "run.log", "wb")  # noqa: SIM115
    kills = 0
    while kills < num_kills:
        process = subprocess.Popen(
            [*POPULACE, "run", str(config)], env=environment, cwd=ROOT, stdout=log, stderr=log
        )
        # Once the shards are there the waves begin; they take about a second together with their
        # commits.
        _wait_for_first_wave(process, tmp_path / "store")
        time.sleep(chance.uniform(0.0, 2.5))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        population = open_population(config)
        for user in population.users():
            if population.ledger.pseudonym(user) in population.ledger.catalog:
                population.verify(user)
        # New experience while nobody trains keeps every round busy.
        population.enqueue_many(
            (user, [_renamed(task, f"round-{kills}-{task.event_id}") for task in tasks[:4]])
            for user, tasks in experience(population.settings)
        )
    assert kills == num_kills, "the run ended before it could be killed"
    done = subprocess.run(
        [*POPULACE, "run", str(config)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    population = open_population(config)
    outcome = account(population)
    assert sum(len(events) for events in outcome.acknowledged.values()) == 50 + num_kills * 20
    assert outcome.is_exact(), outcome
    assert population.status().pending_events == 0
    for user in population.users():
        findings = population.verify(user)
        kept = sum(info.is_kept for info in population.revisions(user)) - 1
        assert not findings.problems
        assert findings.num_blobs >= 2 * kept > 0, (
            "weights and evidence of what the retention rule keeps"
        )


def _renamed(task, event_id: str):  # type: ignore[no-untyped-def]
    import dataclasses

    return dataclasses.replace(task, event_id=event_id)


def _wait_for_first_wave(process: subprocess.Popen[bytes], store: Path) -> None:
    """Until this run writes its first revision record after its claims of both partitions."""
    before = len(list(store.glob("ray/revisions/*/*.json"))) + 2
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(store.glob("ray/revisions/*/*.json"))) > before:
            return
        time.sleep(0.02)
    raise AssertionError(f"no claim; the run's exit code is {process.poll()}")


def test_ctrl_c_ends_after_the_current_wave_and_releases(
    head: dict[str, str], config: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [*POPULACE, "run", str(config)],
        env=on_head(head),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    _wait_for_first_wave(process, tmp_path / "store")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0, out
    assert "stopping after this wave" in out
    population = open_population(config)
    assert not population.status().running
    assert account(population).is_exact() or population.status().pending_events > 0
    again = subprocess.run(
        [*POPULACE, "run", str(config)], env=on_head(head), cwd=ROOT, timeout=120
    )
    assert again.returncode == 0
    assert account(open_population(config)).is_exact()


def test_a_submitted_job_trains_the_population(
    head: dict[str, str], config: Path, tmp_path: Path
) -> None:
    done = submit(head, "run", str(config), "run.max_waves=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert "wave   2" in done.stdout


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with ray_here(
        num_cpus=2,
        object_store_memory=100_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    ):
        yield


def test_a_reward_that_hangs_raises_or_dies_costs_only_its_own_event(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = Reply(messages=(), text="eerie", num_tokens=2, finished=True, base_logprob=-1.0)

    def request(name: str) -> RewardRequest:
        return RewardRequest(
            target=f"tests.support.rewards:{name}", arguments={}, replies=(reply, reply)
        )

    monkeypatch.setattr("populace.population.waves.reward_tasks.START_GRACE_S", 8.0)
    names = [
        "letters",
        "hanging",
        "raising",
        "dying",
        "letters",
        "missing",
        "hanging",
        "deaf",
        "letters",
    ]
    outcomes = score_on_ray([request(name) for name in names], timeout_s=2.0)
    assert outcomes[0] == outcomes[4] == outcomes[8] == (0.6, 0.6)
    texts = [
        f"{outcome.text} {outcome.said}" if isinstance(outcome, Reason) else ""
        for outcome in outcomes
    ]
    assert "longer than 2.0 s" in texts[1] and "longer than 2.0 s" in texts[6]
    assert "was killed" in texts[7]
    assert "this reward is broken" in texts[2]
    assert "reward task failed" in texts[3]
    assert "can't be imported" in texts[5]


@pytest.fixture
def gateway_store(tmp_path: Path) -> FileStore:
    store = FileStore(tmp_path / "store")
    make_population(store)
    return store


def test_many_producers_share_a_gateway_that_survives_its_own_death(
    local_ray: None, gateway_store: FileStore
) -> None:
    store, rewards = gateway_store, {"letters": "m:f"}
    with pytest.raises(InvalidInput, match=r"stream\.gateway=true"):
        Gateway.connect(store.url, "pop")
    gateway = Gateway.start(
        store.url, "pop", rewards=rewards, stream=StreamSettings(linger_ms=5, max_waiting_mb=0.05)
    )
    again = Gateway.connect(store.url, "pop", rewards=rewards)

    def event(number: int, size: int = 10) -> Demonstration:
        return Demonstration(prompt="rain", completion="x" * size, event_id=f"e{number}")

    async def everybody() -> None:
        sent = (again.enqueue_async(f"user-{n % 20}", [event(n)]) for n in range(200))
        assert await asyncio.gather(*sent) == [1] * 200

    asyncio.run(everybody())
    with pytest.raises(InvalidInput, match="reward 'nope' is not registered"):
        gateway.enqueue("ada", [Task(prompt="hi", reward="nope")])
    with pytest.raises(Overloaded) as error:
        asyncio.run(overload(gateway, [event(n, 4000) for n in range(1000, 1040)]))
    assert error.value.retry_after_s > 0
    pid = ray.get(gateway._actor.pid.remote())
    os.kill(pid, signal.SIGKILL)
    assert gateway.enqueue("late", [event(1), event(2)]) == 2
    assert ray.get(gateway._actor.pid.remote()) != pid
    ledger = ledger_of(store, PopulationMeta.read(store, "pop"))
    ledger.refresh()
    segments = sum(
        len(list(log.read_from(0))) for log in (item.log for item in ledger.consumers.values())
    )
    names = set(ledger.users().values())
    assert {f"user-{n}" for n in range(20)} | {"late"} <= names
    assert ledger.pending.num_pending() >= 202 and segments < 150, "calls share segments"
    ledger.keys.forget(ledger.pseudonym("late"))
    with pytest.raises(Forgotten):
        gateway.enqueue("late", [event(3)])
    gateway.stop()


async def overload(gateway: Gateway, events: list[Demonstration]) -> None:
    """More at once than may wait."""
    await asyncio.gather(*(gateway.enqueue_async("ada", [event] * 10) for event in events))


def test_the_streaming_example_learns_from_users_while_they_talk(
    head: dict[str, str], bases: dict[str, Path], tmp_path: Path
) -> None:
    config = ROOT / "examples" / "streaming" / "config.yaml"
    overrides = [
        f"base.model={bases['mixtral']}", f"store=file://{tmp_path}/store",
        f"residency.near_folder={tmp_path}/near",
        "run.threads=1", "run.takeover_s=2.5", "adapter.rank=2",
    ]  # fmt: skip
    environment = on_head(head)
    talking = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "examples.streaming.users",
            str(config),
            *overrides,
            "--seconds",
            "12",
            "--pause",
            "1",
        ],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "store" / "streaming" / "population.json").exists():
        assert talking.poll() is None
        time.sleep(0.1)
    training = subprocess.Popen(
        [*POPULACE, "run", str(config), *overrides],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    told, _ = talking.communicate(timeout=240)
    training.send_signal(signal.SIGINT)
    log, _ = training.communicate(timeout=120)
    assert talking.returncode == 0 and training.returncode == 0, told + log
    assert "events of 14 users are durable" in told and "done: " in told and "  wave " in log
    settings = load_settings(config, overrides)
    population = Population.open(settings.store, settings)
    outcome = account(population)
    assert outcome.is_exact() and len(outcome.trained) > 20
