"""Exams: revisions answer the tasks that are never trained on, and tips are judged by them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from statistics import fmean
from typing import Any

from populace.population.evaluation.verdict import verdict
from populace.population.experience.sealing import LoggedEvent, Reason
from populace.population.ledger.ledger import Ledger
from populace.population.waves.prepare import task_request
from populace.population.waves.rewards import Reply
from populace.population.waves.rollouts import Trials, rollout_request, task_of
from populace.storage.catalog.states import AdapterState
from populace.storage.log.records import Verdict
from populace.workers.batch import AdapterKey


class Examiner:
    """Measures held-out rewards, each revision once, and appends verdicts. `ledger` must be claimed
    to judge."""

    def __init__(self, trials: Trials, ledger: Ledger) -> None:
        self.trials, self.ledger, self.settings = trials, ledger, trials.settings
        self._heldout_rewards: dict[AdapterKey, dict[str, float]] = {}
        self._tasks: dict[str, tuple[int, list[LoggedEvent]]] = {}
        """Pseudonym -> number of held-out tasks when they were looked through, and those to use."""

    def evaluate(self) -> list[Verdict]:
        """Judge every adapter whose tip is not what serves, on its held-out tasks."""
        owned = set(self.ledger.owned())
        candidates = [
            adapter for adapter in self.ledger.catalog.unjudged() if adapter.partition in owned
        ]
        verdicts = []
        size = self.settings.scheduler.max_adapters_per_wave
        for start in range(0, len(candidates), size):
            part = candidates[start : start + size]
            self.measure([(adapter, n) for adapter in part for n in (adapter.tip, adapter.serving)])
            judged: list[tuple[int, Verdict]] = []
            for adapter in part:
                tip, serving = (
                    self.heldout_rewards(adapter, number)
                    for number in (adapter.tip, adapter.serving)
                )
                record = verdict(adapter, tip, serving, self.settings.evaluation)
                judged.append((adapter.partition, record))
            self.ledger.append_all(judged)
            verdicts += [record for _, record in judged]
        _shorten(self._heldout_rewards)
        _shorten(self._tasks, 1 << 12)
        return verdicts

    def heldout_rewards(self, adapter: AdapterState, revision: int) -> dict[str, float]:
        """Task id -> mean reward of `revision` on its user's held-out tasks, as last measured."""
        return self._heldout_rewards.get(AdapterKey(adapter.pseudonym, revision), {})

    def forget(self, pseudonyms: Collection[str]) -> None:
        """Drop what users asked, and how their revisions did."""
        for pseudonym in pseudonyms:
            self._tasks.pop(pseudonym, None)
        for key in [key for key in self._heldout_rewards if key.pseudonym in pseudonyms]:
            del self._heldout_rewards[key]

    def heldout_tasks(self, pseudonym: str) -> list[LoggedEvent]:
        """The held-out tasks that evaluations use: the first ones that can be answered and
        rewarded."""
        positions, most = self.ledger.pending.heldout(pseudonym), self.settings.evaluation.max_tasks
        num_seen, tasks = self._tasks.get(pseudonym, (0, []))
        if len(tasks) < most and num_seen < len(positions):
            partition = self.ledger.catalog.require(pseudonym).partition
            new = self.ledger.events(partition, positions[num_seen:])
            answerable = filter(self._is_answerable, new)
            tasks = [*tasks, *itertools.islice(answerable, most - len(tasks))]
            self._tasks[pseudonym] = (len(positions), tasks)
        return tasks

    def _is_answerable(self, logged: LoggedEvent) -> bool:
        task, settings = task_of(logged), self.settings
        if task.reward not in settings.rewards.functions:
            return False
        request = task_request(AdapterKey("", 0), task, 1, self.trials.chat, settings)
        return not isinstance(request, Reason)

    def answer_heldout(
        self, exams: Sequence[tuple[AdapterState, int, Sequence[LoggedEvent]]], num_samples: int
    ) -> list[tuple[AdapterKey, LoggedEvent, tuple[Reply, ...]]]:
        """Let revisions answer tasks: every (revision, task) with what a reward sees of the
        answers, in order."""
        asked = [
            (AdapterKey(adapter.pseudonym, revision), logged)
            for adapter, revision, tasks in exams
            for logged in tasks
        ]
        if not asked:
            return []
        refs = {(adapter.pseudonym, n): self.ledger.ref(adapter, n) for adapter, n, _ in exams}
        self.trials.workers.page_in(list(refs.values()), False)
        chat, rollout = self.trials.chat, self.settings.rollout
        rollouts = self.trials.roll_out(
            [
                rollout_request(key, task_of(logged), num_samples, chat, rollout)
                for key, logged in asked
            ]
        )
        return [
            (key, logged, self.trials.replies(logged, rollout))
            for (key, logged), rollout in zip(asked, rollouts, strict=True)
        ]

    def measure(self, pairs: Sequence[tuple[AdapterState, int]]) -> None:
        """Measure the held-out rewards that aren't known yet. Revisions never change, so once is
        enough."""
        exams = []
        for pseudonym, revision in dict.fromkeys((adapter.pseudonym, n) for adapter, n in pairs):
            known = self._heldout_rewards.get(AdapterKey(pseudonym, revision), {})
            tasks = [item for item in self.heldout_tasks(pseudonym) if item.event_id not in known]
            exams.append((self.ledger.catalog.require(pseudonym), revision, tasks))
        answers = self.answer_heldout(exams, self.settings.evaluation.samples_per_task)
        requests = [self.trials.reward_request(logged, replies) for _, logged, replies in answers]
        outcomes = self.trials.judge(requests)
        for (key, logged, _), outcome in zip(answers, outcomes, strict=True):
            # An answer that its reward can't judge is worth nothing: a tip must not be promoted for
            # breaking it.
            reward = 0.0 if isinstance(outcome, Reason) else fmean(outcome)
            self._heldout_rewards.setdefault(key, {})[logged.event_id] = reward


def _shorten(memory: dict[Any, Any], most: int = 1 << 14) -> None:
    """Drop what was put in first; it is measured again when it is needed again."""
    for key in list(itertools.islice(memory, max(0, len(memory) - most))):
        del memory[key]
