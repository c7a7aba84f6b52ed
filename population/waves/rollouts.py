"""Trials: tasks become rollouts with their log-probabilities under the base, and what rewards see
of them.

Used by the loop, which learns from trials, and by evaluations, which only look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from populace.configs.schema import Settings
from populace.population.experience.events import Task, messages_of
from populace.population.experience.sealing import LoggedEvent
from populace.population.waves.chat import Chat
from populace.population.waves.rewards import Reply, RewardOutcome, RewardRequest
from populace.workers.batch import AdapterKey, Floats, RolloutGroup, RolloutRequest
from populace.workers.interface import Workers

Score = Callable[[Sequence[RewardRequest], float], list[RewardOutcome]]

Rollout = tuple[RolloutGroup, tuple[Floats, ...]]
"""A group and its samples' log-probabilities under the base."""


class Trials:
    """Asks revisions to answer tasks, and rewards to judge the answers."""

    def __init__(self, settings: Settings, workers: Workers, chat: Chat, score: Score) -> None:
        self.settings, self.workers, self.chat, self._score = settings, workers, chat, score

    def requester(self, key: AdapterKey) -> Callable[[Task], RolloutRequest]:
        return lambda task: self.request(key, task, self.settings.rollout.samples_per_task)

    def request(self, key: AdapterKey, event: Task, num_samples: int) -> RolloutRequest:
        return RolloutRequest(
            adapter=key,
            event_id=str(event.event_id),
            prompt_ids=self.chat.prompt_ids(event.prompt),
            num_samples=num_samples,
            max_new_tokens=self.settings.rollout.max_new_tokens,
            temperature=self.settings.rollout.temperature,
        )

    def roll_out(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """Rollouts, each with its log-probabilities under the base."""
        if not requests:
            return []
        groups = self.workers.roll_out(requests)
        return list(zip(groups, self.workers.score_base(groups), strict=True))

    def replies(
        self, logged: LoggedEvent, group: RolloutGroup, base: tuple[Floats, ...]
    ) -> tuple[Reply, ...]:
        messages = tuple(messages_of(task_of(logged).prompt))
        return tuple(
            Reply(
                messages=messages,
                text=self.chat.text(sample.completion_ids),
                num_tokens=len(sample.completion_ids),
                finished=sample.finished,
                base_logprob=float(np.mean(logprobs)),
            )
            for sample, logprobs in zip(group.samples, base, strict=True)
        )

    def reward_request(self, logged: LoggedEvent, replies: tuple[Reply, ...]) -> RewardRequest:
        """What a reward worker is sent."""
        task = task_of(logged)
        target = self.settings.rewards.functions[task.reward]
        return RewardRequest(target=target, arguments=task.reward_args, replies=replies)

    def judge(self, requests: Sequence[RewardRequest]) -> list[RewardOutcome]:
        """Run the rewards."""
        return self._score(requests, self.settings.rewards.timeout_s) if requests else []


def task_of(logged: LoggedEvent) -> Task:
    assert isinstance(logged.event, Task)
    return logged.event
