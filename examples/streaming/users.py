"""Users who talk to their models and say what they think of the answers, without end.

    populace run examples/streaming/config.yaml                 # in one terminal, until Ctrl-C
    python -m examples.streaming.users examples/streaming/config.yaml --seconds 60      # in another

Each user sends some feedback on answers that happened (trajectories), now and then a better answer
(a demonstration) or something to practise (a task). The program returns once the population has
learned from all of it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

from examples.preferences.users import LIKES, PROMPTS
from populace.population import (
    Demonstration,
    Experience,
    OutcomeUnknown,
    Overloaded,
    Population,
    Task,
    Trajectory,
    load_settings,
)

REPLIES = [
    "Yes, it is.",
    "No.",
    "Water that falls from clouds.",
    "It depends, my friend!",
    "ask me again, will you?",
]
BETTER = "Let us see, step by step."


def think(user: str, number: int, chance: random.Random) -> Experience:
    """What a user has to say for the `number`th time. Event ids name user and number: sent again,
    it counts once."""
    prompt, event_id = chance.choice(PROMPTS), f"{user}-{number}"
    match chance.random():
        case draw if draw < 0.2:
            return Task(
                prompt=prompt, reward="preference", reward_args=LIKES[user], event_id=event_id
            )
        case draw if draw < 0.3:
            return Demonstration(prompt=prompt, completion=BETTER, event_id=event_id)
    return Trajectory(
        prompt=prompt, completion=chance.choice(REPLIES), reward=chance.random(), event_id=event_id
    )


async def live(
    population: Population, user: str, deadline: float, pause_s: float, first: int
) -> int:
    """One user's life; returns how many events it sent."""
    chance, number = random.Random(f"{user}/{first}"), first
    while time.monotonic() < deadline:
        await asyncio.sleep(chance.expovariate(1 / pause_s))
        event = think(user, number, chance)
        while True:
            try:
                await population.enqueue_async(user, [event])
                break
            except Overloaded as error:  # nothing was written
                await asyncio.sleep(error.retry_after_s)
            except OutcomeUnknown:  # the same event again: it counts once
                await asyncio.sleep(1.0)
        number += 1
    return number - first


async def watch(population: Population, every_s: float) -> None:
    """Say now and then how far the population is."""
    while True:
        await asyncio.sleep(every_s)
        status = await asyncio.to_thread(population.status)
        print(
            f"{status.pending_events:4d} events wait, the oldest for {status.oldest_wait_s:.0f} s; "
            f"{status.revisions} revisions of {status.adapters} adapters",
            flush=True,
        )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument(
        "overrides", nargs="*", help="section.key=value, as `populace run` was given"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long users go on")
    parser.add_argument(
        "--pause", type=float, default=5.0, help="mean seconds between two events of a user"
    )
    options = parser.parse_args()
    settings = load_settings(options.config, options.overrides)
    population = Population.create(settings.store, settings)
    first = int(time.time())  # another start of this program has other things to say
    deadline = time.monotonic() + options.seconds
    watching = asyncio.create_task(watch(population, every_s=5.0))
    sent = await asyncio.gather(
        *(live(population, user, deadline, options.pause, first) for user in LIKES)
    )
    print(
        f"{sum(sent)} events of {len(LIKES)} users are durable; waiting until they are learned "
        "from",
        flush=True,
    )
    while (await asyncio.to_thread(population.status)).pending_events:
        await asyncio.sleep(1.0)
    watching.cancel()
    status = population.status()
    print(
        f"done: {status.revisions} revisions, {status.heldout_tasks} tasks held out, "
        f"{status.settled_events} settled"
    )


if __name__ == "__main__":
    asyncio.run(main())
