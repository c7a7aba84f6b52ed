"""Ray for tests: a head with its dashboard on loopback and jobs on it, or Ray in this process."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import ray

ROOT = Path(__file__).parents[2]
ADDRESS = "127.0.0.2:26379"
DASHBOARD = "http://127.0.0.1:28265"
TOKEN = "a" * 64


@contextmanager
def without_tokens() -> Iterator[None]:
    """No token authentication for Ray in this process. Left alone, `ray.init("local")` switches it
    on for as long as the process lives, and a cluster that another test starts without it can't
    talk to this driver any more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield


@contextmanager
def ray_here(**options: Any) -> Iterator[None]:
    """A Ray of its own in this process; `options` are those of `ray.init`."""
    with without_tokens():
        ray.init("local", include_dashboard=False, log_to_driver=False, **options)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def ray_nodes(**head: Any) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` without tokens that has a head alone; `head` are its arguments.
    What it starts finds this checkout."""
    from ray.cluster_utils import Cluster

    variables = {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "0",
    }  # fmt: skip
    with without_tokens(), pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        temporary = f"/tmp/rn{os.getpid()}-{time.monotonic_ns() % 1000}"
        nodes = Cluster(
            initialize_head=True,
            head_node_args={"include_dashboard": False, "temp_dir": temporary, **head},
        )
        try:
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


@contextmanager
def ray_head(folder: Path, **variables: str) -> Iterator[dict[str, str]]:
    """`ray start --head` with token authentication; yields the environment in which others find it.
    `variables` are the head's, and so its jobs'."""
    temporary = Path("/tmp") / f"rp{os.getpid()}"  # Ray's socket paths must stay short
    with open(Path(tempfile.gettempdir()) / "populace-tests-head.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the ports below, also of tests in another process
        with _started_head(folder, temporary, variables) as environment:
            yield environment


@contextmanager
def _started_head(
    folder: Path, temporary: Path, variables: Mapping[str, str]
) -> Iterator[dict[str, str]]:
    environment = head_environment(folder, TOKEN) | variables
    options = (
        "--node-ip-address=127.0.0.2",
        "--port=26379",
        "--dashboard-host=127.0.0.1",
        "--dashboard-port=28265",
        "--metrics-export-port=28080",
        # The agents' default ports clash with any other Ray on this machine.
        "--dashboard-agent-listen-port=28266",
        "--dashboard-agent-grpc-port=28267",
        "--runtime-env-agent-port=28268",
        "--object-store-memory=200000000",
    )
    with head_process(temporary, environment, options) as process:
        _wait_for_dashboard(process)
        yield {**environment, "RAY_TEMPORARY": str(temporary)}


def head_environment(folder: Path, token: str) -> dict[str, str]:
    """The environment of a head with token authentication; the token lies in `folder`."""
    (folder / "token").write_text(token)
    return {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def head_process(
    temporary: Path, environment: Mapping[str, str], options: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start --head` on loopback, ended with all that it has started."""
    process = subprocess.Popen(
        [
            Path(sys.executable).parent / "ray",
            "start",
            "--head",
            "--block",
            *options,
            "--num-cpus=4",
            f"--temp-dir={temporary}",
            "--disable-usage-stats",
        ],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def on_head(environment: dict[str, str]) -> dict[str, str]:
    """For a driver that joins the head by itself."""
    return {**environment, "RAY_ADDRESS": ADDRESS}


def submit(
    head: dict[str, str], *words: str, flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """`ray job submit -- populace WORDS`, and wait for it unless `flags` say otherwise."""
    tools = Path(sys.executable).parent
    command = [
        str(tools / "ray"),
        "job",
        "submit",
        "--working-dir",
        ".",
        *flags,
        "--",
        str(tools / "populace"),
        *words,
    ]
    environment = {**head, "RAY_API_SERVER_ADDRESS": DASHBOARD}
    for _ in range(20):  # the head's agent registers some seconds after the dashboard answers
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
        )
        if "No available agent" not in done.stderr:
            break
        time.sleep(3)
    return done


def ask(path: str) -> bytes:
    """What the dashboard's API answers."""
    request = urllib.request.Request(
        f"{DASHBOARD}{path}", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        body: bytes = answer.read()
    return body


def _wait_for_dashboard(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, "ray start ended"
        try:
            ask("/api/jobs/")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError("the dashboard did not come up")
