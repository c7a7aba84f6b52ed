"""Kill -9 of a committing process at random moments: nothing acknowledged is lost, nothing is there
twice or torn."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from populace.population.experience.log import ExperienceLog
from populace.storage.catalog.catalog import Catalog
from populace.storage.log.loading import BlobRequest, load_wave
from populace.storage.log.records import WaveManifest
from populace.storage.log.verify import Findings, verify_partition
from populace.storage.objects.bucket import Bucket
from populace.storage.objects.open import open_store
from tests.storage.test_log_and_catalog import state_of
from tests.support.committer import USERS, commit_for_ever
from tests.support.history import History
from tests.support.servers import seaweedfs


@contextlib.contextmanager
def place(kind: str, tmp_path: Path) -> Iterator[str]:
    if kind == "file":
        yield f"file://{tmp_path}/store"
        return
    with seaweedfs() as endpoint:
        url = f"s3://kills?endpoint={endpoint}"
        Bucket(url).ensure()
        yield url


def check(history: History, journal: Path) -> int:
    """Compare what the processes were told with what is there; returns the number of waves."""
    said = [line.split() for line in journal.read_text().splitlines()]
    told: dict[str, set[str]] = {}
    for verb, what in said:
        told.setdefault(verb, set()).add(what)
    waves, whole = Counter[str](), Catalog()
    for header, record in history.reader().read_new():
        whole.apply(header, record)
        if isinstance(record, WaveManifest):
            waves[record.wave] += 1
    assert set(waves.values()) <= {1}, "a wave is there twice"
    assert told.get("done", set()) <= waves.keys() <= told.get("try", set()), (
        "an acknowledged wave is lost"
    )
    findings = Findings()
    verify_partition(history.store, "pop", 0, history.root_key, findings)
    assert findings.problems == []
    assert state_of(history.open()[1]) == state_of(whole), (
        "checkpoint and tail differ from the whole log"
    )
    requests = [
        BlobRequest(pseudonym=adapter.pseudonym, revision=state.revision, part=part, place=blob)
        for adapter in whole
        for state in whole.revisions_of(adapter.pseudonym)
        for part, blob in state.blobs.items()
    ]
    load_wave(history.store, history.keys(), requests)
    events = Counter(
        row["tag"]
        for _, rows in ExperienceLog(history.store, "pop", 0).read_from(0)
        for row in rows.to_pylist()
    )
    assert set(events.values()) <= {1} and told.get("sent", set()) <= events.keys()
    return len(waves)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "num_kills"),
    [
        ("file", 15),
        pytest.param("file", 200, marks=pytest.mark.slow),
        pytest.param("seaweedfs", 50, marks=pytest.mark.slow),
    ],
)
def test_kill_9_of_a_committing_process_loses_repeats_and_tears_nothing(
    kind: str, num_kills: int, tmp_path: Path
) -> None:
    seed = int(os.environ.get("POPULACE_TEST_SEED", time.time_ns() % 10**6))
    print(f"kill seed {seed} (set POPULACE_TEST_SEED to repeat)")
    chance = random.Random(seed)
    with place(kind, tmp_path) as url:
        history = History(open_store(url), tmp_path / "keys")
        owner, catalog = history.claim("setup")
        for user in USERS:
            history.create(owner, catalog, user)
        journal = tmp_path / "journal"
        journal.touch()
        # Spawning from a server that has everything imported: a life begins in milliseconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.committer"])
        num_waves = 0
        for life in range(num_kills):
            arguments = (url, tmp_path / "keys", journal, life, dict(os.environ))
            process = context.Process(target=commit_for_ever, args=arguments)
            before = journal.stat().st_size
            process.start()
            deadline = time.monotonic() + 60
            while journal.stat().st_size == before and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(chance.uniform(0.0, 0.4 if kind == "file" else 1.0))
            assert process.is_alive(), f"life {life} ended by itself, with code {process.exitcode}"
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            if life % 10 == 9 or life == num_kills - 1:
                num_waves = check(history, journal)
        print(f"{num_kills} kills, {num_waves} waves committed, 0 lost, 0 twice, 0 torn")
        assert num_waves > num_kills / 2, "the processes hardly got to commit anything"
