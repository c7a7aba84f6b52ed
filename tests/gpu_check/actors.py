"""A run on Ray actors, each on a GPU of its own, killed in the middle of a wave."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray

from tests.gpu_check.check import Check
from tests.support import tiny
from tests.support.accounting import account
from tests.support.heads import ray_here
from tests.support.streams import open_population, write_config

ROOT = Path(__file__).parents[2]
POPULACE = [sys.executable, "-c", "from populace.population.cli.app import main; main()"]


def actors(check: Check) -> None:
    """Enqueue to signed revisions through the command; its process is killed once, as soon as a
    wave landed, and the next one goes on. Dry, shards compute on CPUs."""
    device = "cpu" if check.dry else "cuda"
    with tempfile.TemporaryDirectory() as name:
        config = write_config(
            Path(name) / "config.yaml", tiny.build("qwen3_moe", Path(name) / "base"), "check",
            shard={"cpus": 0.5}, scheduler={"events_per_update": 4, "slots": 12},
            run={"takeover_s": 1.0},
        )  # fmt: skip
        own = {"POPULACE_KEYS": f"{name}/keys", "POPULACE_CACHE": f"{name}/cache"}
        os.environ.update(own)
        with ray_here(num_cpus=4):
            environment = {
                **os.environ,
                "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "TRITON_INTERPRET": "0",
            }
            seen = run(config, device, environment, check.left_s, kill=True)
            check.say(f"killed after {seen:.0f} s, with its first wave in the store")
            took = run(config, device, environment, check.left_s, kill=False)
            check.say(f"the next one went on and ended after {took:.0f} s")
        population = open_population(config)
        outcome = account(population)
        check.require(outcome.is_exact(), f"not exactly once: {outcome}")
        check.require(not population.status().pending_events, "events are left")
        problems = [p for user in population.users() for p in population.verify(user).problems]
        check.require(not problems, f"verify: {problems[:2]}")
        status = population.status()
        check.say(
            f"{status.revisions} revisions of {status.adapters} adapters on {device}, verified"
        )


def run(
    config: Path, device: str, environment: dict[str, str], limit_s: float, *, kill: bool
) -> float:
    """Seconds until it ended, or was killed."""
    started, before = time.monotonic(), packs(config)
    log = config.parent / "run.log"
    with open(log, "a") as output:
        process = subprocess.Popen(
            [*POPULACE, "run", str(config), f"base.device={device}"], env=environment, cwd=ROOT,
            stdout=output, stderr=output,
        )  # fmt: skip
        try:
            while process.poll() is None:
                if kill and packs(config) > before:
                    process.kill()
                    process.wait()
                    return time.monotonic() - started
                if time.monotonic() > started + limit_s:
                    raise TimeoutError(f"a run took over {limit_s:.0f} s: {tail(log)}")
                time.sleep(0.05)
        finally:
            process.kill()
            code = process.wait()
    if code or kill:
        raise RuntimeError(f"a run ended by itself with {code}: {tail(log)}")
    return time.monotonic() - started


def packs(config: Path) -> int:
    return len(list((config.parent / "store").glob("check/packs/*/*")))


def tail(log: Path) -> str:
    return " / ".join(log.read_text().splitlines()[-4:])
