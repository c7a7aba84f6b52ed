"""One wave, from two events to two revisions, in the order in which a run does it.

    python -m examples.one_wave [BASE]

`Controller.run_once` in population/controller.py makes the same calls, with the neighbouring waves
beside this one; population/run.py is what restarts, takes over and waits when something dies.
"""

from __future__ import annotations

import sys

from populace.configs.load import settings_as_dict
from populace.configs.schema import BaseSettings, EvaluationSettings, RewardSettings, Settings
from populace.population import Demonstration, Population, Reply, Task
from populace.population.sampler import shard_settings
from populace.population.waves.chat import Chat
from populace.population.waves.outcomes import account_for, scored_group
from populace.population.waves.planner import Planner
from populace.population.waves.publisher import Publisher
from populace.population.waves.rewards import score_replies
from populace.population.waves.rollouts import Trials
from populace.population.waves.wave import TrainedWave, batch_of
from populace.workers.actors.engine import ShardEngine
from populace.workers.base.registry import prepare_base


def short(reply: Reply) -> float:
    """1 for one token, less for more."""
    return 1 / reply.num_tokens


def main(model: str = "smollm2-moe") -> Population:
    settings = Settings(
        name="one-wave",
        base=BaseSettings(model=model),
        rewards=RewardSettings(functions={"short": "examples.one_wave:short"}),
        evaluation=EvaluationSettings(heldout_share=0.0),
    )
    base = prepare_base(model, print)
    chat, population = Chat(base.folder), Population.create("memory://", settings)

    # An event is durable once `enqueue` returns: encrypted, in the log of its user's partition.
    population.enqueue("ada", [Task(prompt="What is rain?", reward="short")])
    population.enqueue("bob", [Demonstration(prompt="What is tea?", completion="Leaves in water.")])

    # Whoever owns a partition reads its log into the pending index: who has what to learn from.
    ledger = population.ledger
    population.ownership.claim(settings.run.takeover_s)
    ledger.read_experience()

    # The frozen base, with slots for adapters. A run has Ray actors here.
    own = shard_settings(settings, population.meta, population.store.url, base, chat)
    workers = ShardEngine(own, population.store)
    dims, numerics = workers.describe()

    # A wave is chosen, its attempt is logged, and each event becomes a request or a group.
    planned = Planner(settings, ledger, chat, dims).plan(ahead=False)
    assert planned is not None
    logged = {item.logged.event_id: item.logged for row in planned.members for item in row.events}

    # Adapters are paged in, all of them answer at once, and rewards judge the answers.
    workers.page_in(planned.refs, with_moments=True)
    trials = Trials(settings, workers, chat, lambda asked, limit: [*map(score_replies, asked)])
    rollouts = trials.roll_out([request for row in planned.members for request in row.requests])
    tasks = [logged[rollout.group.event_id] for rollout in rollouts]
    replies = [trials.replies(task, out) for task, out in zip(tasks, rollouts, strict=True)]
    judged = trials.judge(list(map(trials.reward_request, tasks, replies)))
    scored = {
        rollout.group.event_id: scored_group(rollout, outcome)
        for rollout, outcome in zip(rollouts, judged, strict=True)
    }

    # Each event ends as trained, settled or failed; what can be trained takes one fused step.
    outcomes = [account_for(row, scored, failures=None) for row in planned.members]
    result = workers.train_wave(batch_of(outcomes))
    trained = TrainedWave.of(planned.wave_id, outcomes, result)

    # The signed manifest is the commit: it publishes the revisions and consumes their events.
    publisher = Publisher(ledger, settings_as_dict(settings), chat.template_digest())
    landed = publisher.start(trained, numerics).collect()
    assert landed is not None and landed.error is None
    for header, record in landed.records:
        ledger.apply(header, record)
    population.ownership.release()
    return population


if __name__ == "__main__":
    done = main(*sys.argv[1:])
    for user in done.users():
        print(user, done.revisions(user)[-1])
