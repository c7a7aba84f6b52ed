"""Experience that tests enqueue."""

from __future__ import annotations

from collections.abc import Iterator

from populace.configs.schema import Settings
from populace.population.experience import Task

WORDS = ["rain", "river", "hills", "sea", "quiet", "yes", "no", "what", "the", "runs", "to", "falls"]


def experience(settings: Settings, num_users: int = 5, num_tasks: int = 10) -> Iterator[tuple[str, list[Task]]]:
    for number in range(num_users):
        yield (
            f"user-{number}",
            [
                Task(
                    event_id=f"task-{index:02d}",
                    prompt=f"{WORDS[index % len(WORDS)]} {WORDS[(index * 5 + number) % len(WORDS)]}",
                    reward="letters",
                    reward_args={"letter": "aeiourst"[number % 8]},
                )
                for index in range(num_tasks)
            ],
        )
