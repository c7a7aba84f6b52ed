"""Trials: tasks become rollouts with their log-probabilities under the base, and what rewards see
of them.

Used by the loop, which learns from trials, and by evaluations, which only look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from populace.configs.schema import RolloutSettings, Settings
from populace.population.experience.events import Task, messages_of
from populace.population.experience.sealing import LoggedEvent
from populace.population.waves.rewards import Reply, RewardOutcome, RewardRequest
from populace.population.waves.wave import Rollout
from populace.workers.batch import AdapterKey, RolloutRequest
from populace.workers.interface import Workers

if TYPE_CHECKING:
    from populace.population.waves.chat import Chat

Score = Callable[[Sequence[RewardRequest], float], list[RewardOutcome]]
"""Runs rewards with a time limit in seconds; `reward_tasks.score_on_ray` is one."""


def rollout_request(
    key: AdapterKey, task: Task, num_samples: int, chat: Chat, rollout: RolloutSettings
) -> RolloutRequest:
    """What the workers are asked, to let an adapter answer a task. Pure."""
    return RolloutRequest(
        adapter=key,
        event_id=str(task.event_id),
        prompt_ids=chat.prompt_ids(task.prompt),
        num_samples=num_samples,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
    )


class Trials:
    """Asks revisions to answer tasks, and rewards to judge the answers."""

    def __init__(self, settings: Settings, workers: Workers, chat: Chat, score: Score) -> None:
        self.settings, self.workers, self.chat, self._score = settings, workers, chat, score

    def roll_out(self, requests: Sequence[RolloutRequest]) -> tuple[Rollout, ...]:
        """Rollouts in the order of the requests; their adapters must be hot."""
        if not requests:
            return ()
        groups = self.workers.roll_out(requests)
        base = self.workers.score_base(groups)
        return tuple(
            Rollout(group=group, base_logprobs=logprobs)
            for group, logprobs in zip(groups, base, strict=True)
        )

    def replies(self, logged: LoggedEvent, rollout: Rollout) -> tuple[Reply, ...]:
        """The answers to a task, as its reward sees them."""
        messages = tuple(messages_of(task_of(logged).prompt))
        return tuple(
            Reply(
                messages=messages,
                text=self.chat.text(sample.completion_ids),
                num_tokens=len(sample.completion_ids),
                finished=sample.finished,
                base_logprob=float(np.mean(logprobs)),
            )
            for sample, logprobs in zip(rollout.group.samples, rollout.base_logprobs, strict=True)
        )

    def reward_request(self, logged: LoggedEvent, replies: tuple[Reply, ...]) -> RewardRequest:
        """What a reward worker is sent."""
        task = task_of(logged)
        target = self.settings.rewards.functions[task.reward]
        return RewardRequest(target=target, arguments=task.reward_args, replies=replies)

    def judge(self, requests: Sequence[RewardRequest]) -> list[RewardOutcome]:
        """Run the rewards, within `rewards.timeout_s` each."""
        return self._score(requests, self.settings.rewards.timeout_s) if requests else []


def task_of(logged: LoggedEvent) -> Task:
    """The task that an event is."""
    assert isinstance(logged.event, Task)
    return logged.event
