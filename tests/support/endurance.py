"""A population under way for long: producers, gateway, controllers and shards, killed at random,
and the account of it.

    python -m tests.support.endurance produce URL NAME WAY JOURNAL RATE SEED USERS

is one producer, run by the test.

Two producers send every event, each through another way: one straight into the store, one through
the gateway. What they send follows from the seed alone, so that a producer that is killed goes on
from its journal.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from populace.population.experience.events import Demonstration, LogEvent, Task, Trajectory
from tests.support.streams import WORDS

ROOT = Path(__file__).parents[2]
POPULACE = [sys.executable, "-c", "from populace.population.cli.app import main; main()"]
BATCH = 25
"""Events of one call."""


def event_at(number: int, seed: int, num_users: int) -> tuple[str, LogEvent]:
    """The `number`th event of the stream: users as in a population where few are busy (Zipf), kinds
    mixed, one in two hundred with a reward that is broken."""
    chance = random.Random(f"{seed}/{number}")
    user = f"user-{min(num_users, int(num_users ** chance.random())):05d}"
    prompt = " ".join(chance.choices(WORDS, k=4))
    completion = " ".join(chance.choices(WORDS, k=6))
    event_id = f"e{number}"
    match chance.random():
        case draw if draw < 0.005:
            return user, Task(prompt=prompt, reward="raising", event_id=event_id)
        case draw if draw < 0.2:
            return user, Task(
                prompt=prompt, reward="letters", reward_args={"letter": "e"}, event_id=event_id
            )
        case draw if draw < 0.8:
            return user, Trajectory(
                prompt=prompt, completion=completion, reward=chance.random(), event_id=event_id
            )
    return user, Demonstration(prompt=prompt, completion=completion, event_id=event_id)


def produce(
    url: str, name: str, way: str, journal: Path, rate: float, seed: int, num_users: int
) -> None:
    """Send for ever; a line of the journal is the number of events acknowledged so far."""
    from populace.population.experience.producer import Producer
    from populace.storage.errors import PopulaceError

    sent = (
        int(journal.read_text().split()[-1])
        if journal.exists() and journal.read_text().split()
        else 0
    )
    target: Any = Producer.open(url, name) if way == "direct" else None
    began, first = time.monotonic(), sent
    with open(journal, "a", buffering=1) as said:
        while True:
            time.sleep(max(0.0, began + (sent - first) / rate - time.monotonic()))
            batch = [event_at(number, seed, num_users) for number in range(sent, sent + BATCH)]
            try:
                target = target or _gateway(url, name)
                target.enqueue_many([(user, [event]) for user, event in batch])
            except PopulaceError as error:
                print(f"{way}: {type(error).__name__}: {error}", flush=True)
                target = target if way == "direct" else None
                time.sleep(0.5)
                continue
            sent += BATCH
            said.write(f"{sent}\n")


def _gateway(url: str, name: str) -> Any:
    import ray

    from populace.population.experience.gateway import Gateway

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error")
    return Gateway.connect(url, name)


@dataclass
class Life:
    """Processes of one run, by role."""

    folder: Path
    environment: Mapping[str, str]
    config: Path
    url: str
    seed: int
    rate: float
    num_users: int
    controllers: tuple[str, ...]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)

    def start(self, role: str) -> None:
        kind, _, name = role.partition(":")
        if kind == "controller":
            command = [
                *POPULACE,
                "run",
                str(self.config),
                "run.until_drained=false",
                f"run.controller={name}",
            ]
        else:
            journal = self.folder / f"journal-{name}"
            options = [str(option) for option in (journal, self.rate, self.seed, self.num_users)]
            command = [
                sys.executable,
                "-m",
                "tests.support.endurance",
                "produce",
                self.url,
                "endure",
                name,
                *options,
            ]
        log = open(self.folder / f"{role.replace(':', '-')}.log", "ab")  # noqa: SIM115
        self.processes[role] = subprocess.Popen(
            command, env=self.environment, cwd=ROOT, stdout=log, stderr=log
        )

    def keep_alive(self) -> None:
        """Start again whatever ended, by itself or by a kill."""
        for role, process in list(self.processes.items()):
            if process.poll() is not None:
                self.start(role)

    def kill(self, role: str) -> None:
        """SIGKILL a process of ours, or an actor of Ray's."""
        if role in self.processes:
            self.processes[role].kill()
            self.processes[role].wait()
        else:
            found = [process for process in actors() if role in process.info["name"].lower()]
            for process in found[:1]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if not found:
                return
        self.kills[role] += 1

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGINT)
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()
            process.wait()

    def memory(self) -> dict[str, float]:
        """Resident megabytes by role, without pages shared with others."""
        found: dict[str, float] = {}
        roles = [
            (role, process.pid)
            for role, process in self.processes.items()
            if process.poll() is None
        ]
        roles += [(process.info["name"], process.pid) for process in actors()]
        for role, pid in roles:
            with suppress(psutil.NoSuchProcess):
                found[role] = (
                    found.get(role, 0.0) + psutil.Process(pid).memory_full_info().uss / 1e6
                )
        return found


def actors() -> list[Any]:
    """Ray's workers that run a shard or the gateway."""
    wanted = ("ray::shardactor", "ray::gatewayactor")
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        title = " ".join(process.info["cmdline"] or [process.info["name"]])
        if title.lower().startswith(wanted):
            process.info["name"] = title.split(".")[0].removeprefix("ray::").strip()
            found.append(process)
    return found


@contextmanager
def ray_head(folder: Path) -> Iterator[dict[str, str]]:
    """A Ray head on loopback without its dashboard; the environment in which others find it."""
    # A producer is this module too, starts often, and needs no Ray.
    from tests.support.heads import head_environment, head_process

    temporary = Path("/tmp") / f"re{os.getpid()}"
    environment = head_environment(folder, "e" * 64)
    options = (
        "--node-ip-address=127.0.0.3",
        "--port=26479",
        "--include-dashboard=false",
        "--object-store-memory=300000000",
        "--dashboard-agent-listen-port=28366",
        "--dashboard-agent-grpc-port=28367",
        "--runtime-env-agent-port=28368",
        "--metrics-export-port=28180",
    )
    with head_process(temporary, environment, options) as process:
        time.sleep(12)
        assert process.poll() is None, "ray start ended"
        yield {**environment, "RAY_ADDRESS": "127.0.0.3:26479"}


def endure(
    folder: Path,
    config: Path,
    *,
    duration_s: float,
    rate: float,
    num_users: int,
    kill_every_s: float,
    controllers: tuple[str, ...],
    seed: int,
) -> list[dict[str, Any]]:
    """Run for `duration_s` with random kills, then let everything be learned from; returns what was
    measured."""
    chance, samples = random.Random(seed), []
    with ray_head(folder) as environment:
        life = Life(
            folder=folder, environment=environment, config=config, url=f"file://{folder}/store",
            seed=seed, rate=rate,
            num_users=num_users, controllers=controllers,
        )  # fmt: skip
        for name in controllers:
            life.start(f"controller:{name}")
        deadline = time.monotonic() + 120
        while (
            "wave" not in _text(folder / f"controller-{controllers[0]}.log")
            and time.monotonic() < deadline
        ):
            if (
                folder / "store" / "endure" / "population.json"
            ).exists() and "producer:direct" not in life.processes:
                life.start("producer:direct")
                life.start("producer:gateway")
            time.sleep(0.5)
        roles = [f"controller:{name}" for name in controllers]
        roles += ["producer:direct", "producer:gateway", "gatewayactor", "shardactor"]
        began = time.monotonic()
        next_kill, next_sample = began + chance.expovariate(1 / kill_every_s), began
        while time.monotonic() - began < duration_s:
            life.keep_alive()
            if time.monotonic() >= next_kill:
                life.kill(chance.choice(roles))
                next_kill = time.monotonic() + chance.expovariate(1 / kill_every_s)
            if time.monotonic() >= next_sample:
                sample = {
                    "seconds": round(time.monotonic() - began, 1),
                    "sent": max(
                        _last_number(folder / f"journal-{way}") for way in ("direct", "gateway")
                    ),
                    "kills": sum(life.kills.values()),
                    "memory_mb": {name: round(size, 1) for name, size in life.memory().items()},
                    "waves": sum(
                        _text(path).count("  wave ") for path in folder.glob("controller-*.log")
                    ),
                    "waiting": _waiting(folder),
                }
                samples.append(sample)
                (folder / "samples.json").write_text(json.dumps(samples))
                next_sample += max(10.0, duration_s / 360)
            time.sleep(0.5)
        life.stop()
        (folder / "kills.json").write_text(json.dumps(life.kills))
        drain = [
            *POPULACE,
            "run",
            str(config),
            "run.until_drained=true",
            f"run.controller={controllers[0]}",
        ]
        done = subprocess.run(
            drain, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=3600
        )
        (folder / "drain.log").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return samples


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _last_number(path: Path) -> int:
    words = _text(path).split()
    return int(words[-1]) if words else 0


def _waiting(folder: Path) -> int:
    """Events that wait, as the controllers' newest lines say."""
    total = 0
    for path in folder.glob("controller-*.log"):
        lines = [line for line in _text(path).splitlines()[-50:] if "  wave " in line]
        if lines and "events wait" in lines[-1]:
            total += int(lines[-1].split(" events wait")[0].split()[-1])
    return total


if __name__ == "__main__":
    _, _, url, name, way, journal, rate, seed, num_users = sys.argv
    produce(url, name, way, Path(journal), float(rate), int(seed), int(num_users))
