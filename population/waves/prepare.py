"""What there is to do with an event: roll it out, train on it as it is, or settle it. Pure.

`PREPARERS` has one function per kind of experience; to add a kind, write its function and register
it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from populace.configs.schema import Settings
from populace.population.experience.events import (
    Demonstration,
    Experience,
    Messages,
    Task,
    Trajectory,
)
from populace.population.experience.sealing import LoggedEvent, Reason
from populace.population.waves.rollouts import rollout_request
from populace.population.waves.wave import PreparedEvent
from populace.storage.catalog.states import AdapterState
from populace.storage.log.records import ReasonKind
from populace.workers.batch import (
    AdapterKey,
    ExperienceKind,
    ExpertIds,
    Floats,
    Ints,
    RolloutRequest,
    Sample,
    ScoredSample,
    TrainGroup,
)
from populace.workers.shapes import BaseDims

if TYPE_CHECKING:
    from populace.population.waves.chat import Chat

Prepared = RolloutRequest | TrainGroup | Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What the events of one adapter are prepared with."""

    adapter: AdapterState
    lineage: Sequence[int]
    """Revisions from the tip back to 0 along the parents; only there for logged trajectories."""
    chat: Chat
    dims: BaseDims
    settings: Settings


def prepare_event(logged: LoggedEvent, given: Preparation) -> PreparedEvent:
    """What there is to do with one event. Nothing it says can raise: what can't be learned from
    is settled with the reason."""
    prepare = PREPARERS[type(logged.event)]
    return PreparedEvent(logged=logged, next=prepare(logged.event, given))


def task_request(
    key: AdapterKey, task: Task, num_samples: int, chat: Chat, settings: Settings
) -> RolloutRequest | Reason:
    """The request for a task, or why it can't be tried."""
    try:
        request = rollout_request(key, task, num_samples, chat, settings.rollout)
    except Exception as error:  # a chat template refuses some conversations, each family its own
        return _refused(error)
    length, most = len(request.prompt_ids) + request.max_new_tokens, _max_length(settings)
    if length > most:
        return Reason(text=f"prompt and answer need {length} tokens, more than {most}")
    return request


def _task(task: Task, given: Preparation) -> Prepared:
    if task.reward not in given.settings.rewards.functions:
        return Reason(text=f"reward {task.reward!r} is not registered in this run")
    key = AdapterKey(given.adapter.pseudonym, given.adapter.tip)
    num_samples = given.settings.rollout.samples_per_task
    return task_request(key, task, num_samples, given.chat, given.settings)


def _trajectory(event: Trajectory, given: Preparation) -> Prepared:
    chat, dims = given.chat, given.dims
    if (reason := _not_trainable(event, given)) is not None:
        return reason
    is_given = len(event.completion_ids) > 0
    completion_ids: Ints = (
        np.asarray(event.completion_ids, np.int32)
        if is_given
        else chat.completion_ids(event.completion)
    )
    if int(completion_ids.max()) >= chat.num_tokens:
        most, known = completion_ids.max(), chat.num_tokens
        return Reason(text=f"completion_ids go up to {most}; this base has {known} tokens")
    expert_ids: ExpertIds | None = None
    if len(event.expert_ids):
        given_ids = np.asarray(event.expert_ids, np.int64)
        expected = (dims.num_moe_layers, dims.experts_per_token)
        if given_ids.shape[1:] != expected:
            shape = given_ids.shape[1:]
            return Reason(text=f"expert_ids have shape {shape} per token; this base has {expected}")
        # An id that this base doesn't have can't be mapped: its position routes natively, out of
        # the loss.
        is_known = (given_ids >= 0) & (given_ids < dims.num_experts)
        expert_ids = np.where(is_known, given_ids, -1).astype(np.int16)
    return _logged_group(
        event,
        Sample(
            completion_ids=completion_ids,
            logprobs=np.asarray(event.logprobs, np.float32) if len(event.logprobs) else None,
            expert_ids=expert_ids,
            finished=True,
        ),
        event.reward,
        ExperienceKind.TRAJECTORY,
        given,
    )


def _demonstration(event: Demonstration, given: Preparation) -> Prepared:
    completion_ids = given.chat.completion_ids(event.completion)
    sample = Sample(completion_ids=completion_ids, logprobs=None, expert_ids=None, finished=True)
    return _logged_group(event, sample, 1.0, ExperienceKind.DEMONSTRATION, given)


PREPARERS: dict[type[Any], Callable[[Any, Preparation], Prepared]] = {
    Task: _task,
    Trajectory: _trajectory,
    Demonstration: _demonstration,
}
"""Kind of experience -> what there is to do with one."""


def _not_trainable(event: Trajectory, given: Preparation) -> Reason | None:
    """Why a logged trajectory's revision rules it out; None if it doesn't."""
    adapter, lineage, revision = given.adapter, given.lineage, event.revision
    if not adapter.exists(revision):
        return Reason(text=f"revision {revision} does not exist")
    if revision not in lineage:
        return Reason(text=f"revision {revision} is not an ancestor of the tip {adapter.tip}")
    age, most = lineage.index(revision), given.settings.train.max_staleness
    if age > most:
        text = f"stale: revision {revision} is {age} updates old, at most {most}"
        return Reason(kind=ReasonKind.STALE, text=text)
    return None


def _logged_group(
    event: Experience,
    whole: Sample,
    reward: float,
    kind: ExperienceKind,
    given: Preparation,
) -> TrainGroup | Reason:
    """What every kind needs that is trained on as it is: one sample, `whole`, after the event's
    prompt; cut, or refused, where it is too long."""
    prompt_ids = _prompt_ids(event.prompt, given.chat)
    if isinstance(prompt_ids, Reason):
        return prompt_ids
    most, length = _max_length(given.settings), len(whole.completion_ids)
    room = most - len(prompt_ids)
    if room < 1:
        return Reason(text=f"prompt has {len(prompt_ids)} tokens, more than {most}")
    if length > room and given.settings.train.over_long == "reject":
        return Reason(text=f"over-long: {len(prompt_ids) + length} tokens, at most {most}")
    return TrainGroup(
        event_id=str(event.event_id),
        kind=kind,
        prompt_ids=prompt_ids,
        prompt_expert_ids=None,
        samples=(
            ScoredSample(sample=_first_tokens(whole, room), reward=reward, base_logprobs=None),
        ),
    )


def _first_tokens(whole: Sample, room: int) -> Sample:
    def cut(column: Floats | ExpertIds | None) -> Any:
        return None if column is None else column[:room]

    return Sample(
        completion_ids=whole.completion_ids[:room],
        logprobs=cut(whole.logprobs),
        expert_ids=cut(whole.expert_ids),
        finished=len(whole.completion_ids) <= room,
    )


def _prompt_ids(prompt: str | Messages, chat: Chat) -> Ints | Reason:
    try:
        return chat.prompt_ids(prompt)
    except Exception as error:  # see task_request
        return _refused(error)


def _refused(error: Exception) -> Reason:
    text = f"the base's chat template refuses the prompt: {type(error).__name__}"
    return Reason(text=text, said=str(error))


def _max_length(settings: Settings) -> int:
    return settings.train.max_sequence_length
