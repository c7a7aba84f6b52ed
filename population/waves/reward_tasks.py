"""Rewards as Ray tasks with a time limit."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from typing import Any

import ray

from populace.population.experience.sealing import Reason
from populace.population.waves.rewards import RewardOutcome, RewardRequest, score_replies

START_GRACE_S = 30.0
"""A worker that starts imports the user's module before its clock runs."""

CREDENTIALS = (
    "AWS_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MINIO_ACCESS_KEY",
    "MINIO_SECRET_KEY",
    "POPULACE_MASTER_KEY",
    "POPULACE_SIGNING_KEY",
)


def score_on_ray(requests: Sequence[RewardRequest], timeout_s: float) -> list[RewardOutcome]:
    """`score_replies` for every request in Ray tasks, as many at a time as there are CPUs.

    The time limit counts from where the user's code starts. A task that an alarm can't interrupt is
    killed `START_GRACE_S` later; tasks never wait behind it, because they ask Ray for no CPU.
    """
    remote = _scoring_task()
    outcomes: list[RewardOutcome] = [()] * len(requests)
    queue = list(range(len(requests)))[::-1]
    running: dict[Any, tuple[int, float]] = {}
    while queue or running:
        while queue and len(running) < max(2, os.cpu_count() or 1):
            index = queue.pop()
            deadline = time.monotonic() + timeout_s + START_GRACE_S
            running[remote.remote(requests[index], timeout_s)] = (index, deadline)
        ready, _ = ray.wait(list(running), num_returns=1, timeout=0.25)
        for reference in ready:
            index, _ = running.pop(reference)
            try:
                outcomes[index] = ray.get(reference)
            except Exception as error:  # the worker died under user code
                first, _, rest = f"{type(error).__name__}: {error}".partition("\n")
                outcomes[index] = Reason(text=f"reward task failed: {first}", said=rest)
        for reference, (index, deadline) in list(running.items()):
            if time.monotonic() > deadline:
                ray.cancel(reference, force=True)
                del running[reference]
                outcomes[index] = Reason(
                    text=f"reward took longer than {timeout_s} s and was killed"
                )
    return outcomes


@functools.cache
def _scoring_task() -> Any:
    """Made once: Ray keeps every remote function that was ever made, in the driver and in the
    cluster."""
    # User code: it gets neither the store's credentials nor the population's keys.
    environment = {"env_vars": {**{name: "" for name in CREDENTIALS}, "POPULACE_KEYS": os.devnull}}
    return ray.remote(num_cpus=0, max_retries=0, runtime_env=environment)(score_replies)
