"""The specialisation matrix: every adapter answers every user's held-out tasks.

On its diagonal a user's own adapter, beside it the others'. A task that several users share is
answered once per adapter and judged by each user's own reward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from populace.population.controller import Controller
from populace.population.experience.events import encode_event, messages_of
from populace.population.experience.sealing import LoggedEvent, Reason
from populace.population.waves.rewards import Reply
from populace.storage.canonical import canonical_json
from populace.storage.catalog.states import AdapterState

MAX_USERS = 32

MATRIX_TASKS = 4


def report_figures(controller: Controller, adapters: Sequence[AdapterState]) -> dict[str, Any]:
    """What report.json holds, but for the time it took."""
    matrix, samples = _matrix(controller, adapters)
    users = {}
    for row, adapter in enumerate(adapters):
        others = [matrix[other, row] for other in range(len(adapters)) if other != row]
        metrics = [
            (state.revision, controller.ledger.entry(adapter, state.revision).metrics)
            for state in controller.ledger.catalog.revisions_of(adapter.pseudonym)
        ]
        curve = [
            {"revision": number, "reward": found["reward"]}
            for number, found in metrics
            if "reward" in found
        ]
        users[user_of(controller, adapter)] = {
            "rank": adapter.spec["rank"],
            "heldout_reward_base": _mean(controller.examiner.heldout_rewards(adapter, 0)),
            "heldout_reward_after": _mean(
                controller.examiner.heldout_rewards(adapter, adapter.serving)
            ),
            "own_minus_others": float(matrix[row, row] - fmean(others)) if others else 0.0,
            "num_revisions": len(metrics),
            "num_tokens": int(sum(found.get("tokens", 0) for _, found in metrics)),
            "num_heldout_tasks": len(controller.examiner.heldout_tasks(adapter.pseudonym)),
            "serving": adapter.serving,
            "curve": curve,
            "samples": samples[row],
        }

    def mean(field: str) -> float:
        return fmean(user[field] for user in users.values()) if users else 0.0

    return {
        "population": controller.ledger.meta.name,
        "base": controller.ledger.meta.base,
        "base_digest": controller.ledger.meta.base_digest,
        "seed": controller.ledger.meta.seed,
        "numerics": controller.numerics,
        "heldout_reward_base": mean("heldout_reward_base"),
        "heldout_reward_after": mean("heldout_reward_after"),
        "own_minus_others": mean("own_minus_others"),
        "num_revisions": sum(user["num_revisions"] for user in users.values()),
        "users": users,
        "matrix": matrix.tolist(),
    }


def _matrix(
    controller: Controller, adapters: Sequence[AdapterState]
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float64]], list[list[dict[str, str]]]]:
    """[adapter, user] mean reward, and per user some answers before and after."""
    tasks = [
        controller.examiner.heldout_tasks(adapter.pseudonym)[:MATRIX_TASKS] for adapter in adapters
    ]
    shared = {_prompt_digest(logged): logged for own in tasks for logged in own}
    size = controller.settings.scheduler.max_adapters_per_wave
    answers: dict[tuple[str, str], tuple[Reply, ...]] = {}
    for start in range(0, len(adapters), size):
        part = [
            (adapter, adapter.serving, list(shared.values()))
            for adapter in adapters[start : start + size]
        ]
        for key, logged, replies in controller.examiner.answer_heldout(part, 1):
            answers[key.pseudonym, _prompt_digest(logged)] = replies
    cells = [
        (
            row,
            column,
            controller.trials.reward_request(
                logged, answers[adapter.pseudonym, _prompt_digest(logged)]
            ),
        )
        for column, own in enumerate(tasks)
        for logged in own
        for row, adapter in enumerate(adapters)
    ]
    outcomes = controller.trials.judge([request for *_, request in cells])
    total = np.zeros((len(adapters), len(adapters)))
    count = np.zeros_like(total)
    for (row, column, _), outcome in zip(cells, outcomes, strict=True):
        if not isinstance(outcome, Reason):
            total[row, column] += fmean(outcome)
            count[row, column] += 1
    before = {
        (key.pseudonym, _prompt_digest(logged)): replies
        for key, logged, replies in controller.examiner.answer_heldout(
            [(a, 0, own[:2]) for a, own in _pairs(adapters, tasks)], 1
        )
    }
    samples = [
        [
            {
                "prompt": messages_of(logged.event.prompt)[-1]["content"],  # type: ignore[union-attr]
                "before": before[adapter.pseudonym, _prompt_digest(logged)][0].text,
                "after": answers[adapter.pseudonym, _prompt_digest(logged)][0].text,
            }
            for logged in own[:2]
        ]
        for adapter, own in _pairs(adapters, tasks)
    ]
    return total / np.maximum(count, 1), samples


def _pairs(
    adapters: Sequence[AdapterState], tasks: Sequence[list[LoggedEvent]]
) -> list[tuple[AdapterState, list[LoggedEvent]]]:
    return list(zip(adapters, tasks, strict=True))


def _prompt_digest(logged: LoggedEvent) -> str:
    """Tasks with one id and one prompt get one answer: sampling is keyed by them."""
    encoded = encode_event(logged.event)
    return hashlib.sha256(
        canonical_json([encoded["event_id"], encoded["body"]["prompt"]])
    ).hexdigest()


def user_of(controller: Controller, adapter: AdapterState) -> str:
    """Whose adapter it is."""
    return controller.ledger.keys.get(adapter.pseudonym).user


def _mean(rewards: dict[str, float]) -> float:
    return fmean(rewards.values()) if rewards else 0.0
