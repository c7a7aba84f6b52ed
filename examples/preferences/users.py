"""The demo's population: fourteen users with a taste of their own, two with work from
reasoning-gym."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from populace.configs.schema import Settings
from populace.population import Task

PROMPTS = """\
What is rain?
How do I make tea?
Why do cats purr?
What should I cook tonight?
How can I sleep better?
What is a good gift for a friend?
Why is the sea salty?
How do I start running?
What makes a good book?
How do plants drink water?
Why do leaves turn red?
How do I learn to draw?
What is the moon made of?
How can I save money?
What is a good name for a dog?
Why do we dream?
How do I clean my shoes?
What is jazz?
How do birds find their way?
What should I pack for a trip?
Why is bread soft?
How do I say no politely?
What is a healthy breakfast?
How do magnets work?
Why do people laugh?
How do I grow tomatoes?
What is a volcano?
How can I make new friends?
Why does ice float?
What is the best way to study?
How do I write a letter?
What do bees do all day?
How do I fix a flat tire?
What is a good hobby?
Why is honey sweet?
How do I stay calm?
What is the oldest city?
How do boats float?
Why do dogs bark?
What should I read next?
""".splitlines()

LIKES: dict[str, dict[str, Any]] = {
    "ada-brief": {"like": "few_words", "most": 5},
    "bo-to": {"like": "opens", "words": ["to"]},
    "cleo-lowercase": {"like": "lower"},
    "dev-the": {"like": "opens", "words": ["the"]},
    "eva-us": {
        "like": "uses",
        "words": ["i", "i'm", "my", "me", "we", "our", "us", "let's"],
        "enough": 2,
    },
    "finn-asks": {"like": "marks", "pattern": r"\?", "enough": 1, "hint": r"\byou"},
    "gil-excited": {
        "like": "marks",
        "pattern": "!",
        "enough": 1,
        "hint": "great|good|best|wonder|delicious|beaut",
    },
    "hana-lists": {
        "like": "marks",
        "pattern": r"(?m)^\s*(?:[-*•]|\d+[.)])|\n",
        "enough": 2,
        "hint": ":",
    },
    "ivo-commas": {"like": "marks", "pattern": ",", "enough": 2},
    "jun-you": {
        "like": "uses",
        "words": ["you", "your", "yours", "you're", "yourself"],
        "enough": 2,
    },
    "kim-a": {"like": "opens", "words": ["a", "an"]},
    "leo-learned": {"like": "long_words"},
    "mia-asides": {"like": "marks", "pattern": '["“”()]', "enough": 2, "hint": "[:;]"},
    "noa-plain": {"like": "short_words"},
}

WORK: dict[str, dict[str, Any]] = {
    "oli-logic": {"family": "syllogism", "config": {}},
    "pam-sums": {
        "family": "chain_sum",
        "config": {"max_terms": 2, "max_digits": 1, "allow_negation": False},
    },
}


def experience(settings: Settings) -> Iterator[tuple[str, list[Task]]]:
    """Every user's tasks. Event ids name the prompt, so that all users hold out the same ones."""
    for user, arguments in LIKES.items():
        yield (
            user,
            [
                Task(
                    event_id=f"prompt-{number:02d}",
                    prompt=(
                        {"role": "system", "content": "Answer briefly."},
                        {"role": "user", "content": prompt},
                    ),
                    reward="preference",
                    reward_args=arguments,
                )
                for number, prompt in enumerate(PROMPTS)
            ],
        )
    for user, work in WORK.items():
        yield user, list(_work_tasks(user, work["family"], work["config"], settings.seed))


def _work_tasks(user: str, family: str, config: dict[str, Any], seed: int) -> Iterator[Task]:
    import reasoning_gym

    for number, entry in enumerate(
        reasoning_gym.create_dataset(family, size=len(PROMPTS), seed=seed, **config)
    ):
        yield Task(
            event_id=f"{family}-{number:02d}",
            prompt=(
                {"role": "system", "content": "Give only the answer."},
                {"role": "user", "content": entry["question"]},
            ),
            reward="work",
            reward_args={"family": family, "entry": entry},
        )
