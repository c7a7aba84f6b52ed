"""One of several processes that append to one experience log. A module of its own: a spawned
process imports it, and the experience log is all that it needs."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from populace.population.experience.log import ExperienceLog
from populace.storage.objects.files import FileStore


def race(
    url: str,
    number: int,
    left: Any,
    barrier: Barrier,
    results: multiprocessing.Queue[tuple[int, int]],
) -> None:
    """Until there were so many appends in all: on a busy machine a time is too short to tell who
    starves."""
    log = ExperienceLog(FileStore(Path(url)), "pop", 0)
    barrier.wait(120)  # processes that start earlier would have the log to themselves
    count = 0
    while left.value > 0:
        log.append([{"pseudonym": f"{number:032x}", "tag": f"{count:032x}", "sealed": b"x" * 100}])
        count += 1
        with left.get_lock():
            left.value -= 1
    results.put((number, count))
