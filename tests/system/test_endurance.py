"""Exactly once over minutes and hours of random kills: `make test-crash`, `make soak`."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from populace.configs.load import load_settings
from populace.population.client import Population
from populace.storage.log.reader import RevisionLogReader
from populace.storage.log.records import Settled, WaveManifest, parts_of
from tests.support.endurance import endure, event_at
from tests.support.streams import write_config


def outcomes(population: Population) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Tags trained, settled and held out, from the logs and the index."""
    trained, settled, heldout = Counter[str](), Counter[str](), Counter[str]()
    meta, ledger = population.meta, population.ledger
    for partition in range(meta.partitions):
        reader = RevisionLogReader(population.store, meta.name, partition, meta.root_key)
        for _, whole in reader.read_new():
            for record in parts_of(whole):
                if isinstance(record, WaveManifest):
                    for entry in record.revisions:
                        trained.update(ref.tag for ref in entry.trained)
                        settled.update(item.event.tag for item in entry.settled)
                elif isinstance(record, Settled):
                    settled.update(item.event.tag for item in record.events)
    ledger.refresh()
    for pseudonym in ledger.pending.pseudonyms():
        row = ledger.pending.row_of(pseudonym)
        partition = int(ledger.pending.users["partition"][row])
        heldout.update(
            item.ref.tag for item in ledger.events(partition, ledger.pending.heldout(pseudonym))
        )
    return trained, settled, heldout


def check(folder: Path, config: Path, seed: int, num_users: int) -> dict[str, int]:
    """Acknowledged = trained + held out + settled, each event in exactly one of them and once."""
    settings = load_settings(config)
    population = Population.open(settings.store, settings)
    trained, settled, heldout = outcomes(population)
    acknowledged = max(
        int((folder / f"journal-{way}").read_text().split()[-1]) for way in ("direct", "gateway")
    )
    seals, tags = population.ledger.seals, set()
    for number in range(acknowledged):
        user, event = event_at(number, seed, num_users)
        tags.add(seals.tag(population.ledger.pseudonym(user), str(event.event_id)))
    ends = trained + settled + heldout
    figures = {
        "acknowledged": len(tags),
        "trained": trained.total(),
        "settled": settled.total(),
        "held out": heldout.total(),
        "lost": len(tags - ends.keys()),
        "twice": sum(count > 1 for count in ends.values()),
        "pending": population.status().pending_events,
        "parked": len(population.parked()),
    }
    print(figures)
    assert figures["lost"] == figures["twice"] == figures["pending"] == 0, figures
    # What was written and never acknowledged may be there too: at most a batch of each producer.
    assert len(ends.keys() - tags) <= 4 * 25, figures
    assert figures["trained"] > 0 and figures["held out"] > 0 and figures["parked"] > 0
    return figures


def run(tmp_path: Path, bases: dict[str, Path], **options: Any) -> None:
    seed = int(os.environ.get("POPULACE_TEST_SEED", time.time_ns() % 10**6))
    folder = Path(os.environ.get("POPULACE_TEST_FOLDER", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed} (set POPULACE_TEST_SEED to repeat), folder {folder}")
    config = write_config(
        folder / "config.yaml",
        bases["mixtral"],
        "endure",
        experience=None,
        partitions=4,
        scheduler={"max_adapters_per_wave": 64, "events_per_update": 4, "slots": 256},
        rollout={"samples_per_task": 2, "max_new_tokens": 4},
        evaluation={"every_waves": 25, "max_tasks": 2},
        retention={"last": 2, "every_waves": 50},
        rewards={
            "functions": {
                "letters": "tests.support.rewards:letters",
                "raising": "tests.support.rewards:raising",
            }
        },
        stream={"gateway": True, "compact_every_segments": 200},
        residency={"warm_mb": 32, "near_mb": 64, "near_folder": str(folder / "near")},
        run={"takeover_s": 3.0, "threads": 1, "checkpoint_every_records": 500},
    )
    endure(folder, config, seed=seed, **options)
    figures = check(folder, config, seed, options["num_users"])
    (folder / "figures.json").write_text(json.dumps(figures))


@pytest.mark.endurance
@pytest.mark.timeout(3600)
def test_ten_minutes_of_kills_lose_and_repeat_nothing(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    run(
        tmp_path, bases, duration_s=float(os.environ.get("POPULACE_TEST_SECONDS", 600)), rate=30.0,
        num_users=2000,
        kill_every_s=20.0, controllers=("a", "b"),
    )  # fmt: skip


@pytest.mark.endurance
@pytest.mark.timeout(3 * 3600)
def test_an_hour_of_twenty_thousand_users_stays_flat(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    run(
        tmp_path, bases, duration_s=float(os.environ.get("POPULACE_TEST_SECONDS", 3600)),
        rate=50.0, num_users=20_000,
        kill_every_s=240.0, controllers=("a",),
    )  # fmt: skip
