"""Experience that tests enqueue."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from populace.configs.load import load_settings
from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.experience.events import Task
from populace.storage.identity import PopulationMeta
from populace.storage.keys.keyring import Keyring
from populace.storage.objects.contract import ObjectStore

WORDS = [
    "rain",
    "river",
    "hills",
    "sea",
    "quiet",
    "yes",
    "no",
    "what",
    "the",
    "runs",
    "to",
    "falls",
]


def word(number: int) -> str:
    return WORDS[number % len(WORDS)]


def experience(
    settings: Settings, num_users: int = 5, num_tasks: int = 10
) -> Iterator[tuple[str, list[Task]]]:
    for number in range(num_users):
        yield (
            f"user-{number}",
            [
                Task(
                    event_id=f"task-{index:02d}",
                    prompt=f"{word(index)} {word(index * 5 + number)}",
                    reward="letters",
                    reward_args={"letter": "aeiourst"[number % 8]},
                )
                for index in range(num_tasks)
            ],
        )


def write_config(path: Path, base: Path, name: str, **more: Any) -> Path:
    """A run on a tiny base with a store beside `path`; `more` adds sections, or settings to a
    section."""
    sections: dict[str, Any] = {
        "name": name,
        "store": f"file://{path.parent}/store",
        "partitions": 2,
        "experience": "tests.support.streams:experience",
        "base": {"model": str(base), "dtype": "float32"},
        "adapter": {"rank": 4, "learning_rate": 0.01},
        "rollout": {"samples_per_task": 4, "max_new_tokens": 6},
        "scheduler": {"max_adapters_per_wave": 4, "events_per_update": 1, "slots": 8},
        "evaluation": {"every_waves": 3},
        "rewards": {"functions": {"letters": "tests.support.rewards:letters"}},
        "run": {"takeover_s": 2.5, "threads": 1},
    }
    for section, settings in more.items():
        sections[section] = (
            {**sections.get(section, {}), **settings} if isinstance(settings, dict) else settings
        )
    path.write_text(yaml.safe_dump(sections))
    return path


def open_population(config: Path) -> Population:
    settings = load_settings(config)
    return Population.open(settings.store, settings)


def make_population(
    store: ObjectStore, *, name: str = "pop", partitions: int = 2
) -> PopulationMeta:
    """A population without a base: enough to enqueue, nothing to train on."""
    return PopulationMeta.create(
        store,
        Keyring(),
        name=name,
        base="none",
        base_digest="b" * 64,
        partitions=partitions,
        seed=0,
        heldout_share=0.0,
    )


def wait_until(
    is_there: Callable[[], bool], what: str, timeout_s: float = 15.0, pause_s: float = 0.05
) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_there():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(pause_s)
