"""A wave member's events become requests for rollouts, groups that are ready to train, or settled
events. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from populace.configs.schema import TrainSettings
from populace.population.experience.events import Demonstration, LogEvent, Task, Trajectory
from populace.population.experience.sealing import LoggedEvent
from populace.population.waves.chat import Chat
from populace.population.waves.wave import Prepared, WaveMember
from populace.storage.catalog.states import AdapterState
from populace.storage.log.records import SettledEvent
from populace.workers.batch import (
    AdapterKey,
    ExpertIds,
    RolloutRequest,
    Sample,
    ScoredSample,
    TrainGroup,
)
from populace.workers.shapes import BaseDims


def prepare_member(
    member: WaveMember,
    adapter: AdapterState,
    *,
    lineage: Sequence[int],
    settle: Callable[[LoggedEvent, str], SettledEvent],
    chat: Chat,
    dims: BaseDims,
    train: TrainSettings,
    request: Callable[[Task], RolloutRequest],
    reward_names: Collection[str],
) -> Prepared:
    requests: list[RolloutRequest] = []
    groups: dict[str, TrainGroup] = {}
    settled: list[SettledEvent] = []
    for logged in member.events:
        match _prepare_event(
            logged.event, adapter, lineage, chat, dims, train, request, reward_names
        ):
            case RolloutRequest() as wanted:
                requests.append(wanted)
            case TrainGroup() as group:
                groups[logged.event_id] = group
            case str() as reason:
                settled.append(settle(logged, reason))
    return Prepared(
        adapter=AdapterKey(adapter.pseudonym, adapter.tip),
        requests=tuple(requests),
        groups=groups,
        settled=tuple(settled),
    )


def task_request(
    task: Task, request: Callable[[Task], RolloutRequest], train: TrainSettings
) -> RolloutRequest | str:
    """The request for a task, or why it can't be tried."""
    try:
        wanted = request(task)
    except (
        Exception
    ) as error:  # the base's chat template refuses some conversations, each family its own
        return f"the base's chat template refuses the prompt: {type(error).__name__}\n{error}"
    length = len(wanted.prompt_ids) + wanted.max_new_tokens
    if length > train.max_sequence_length:
        return f"prompt and answer need {length} tokens, more than {train.max_sequence_length}"
    return wanted


def _prepare_event(
    event: LogEvent,
    adapter: AdapterState,
    lineage: Sequence[int],
    chat: Chat,
    dims: BaseDims,
    train: TrainSettings,
    request: Callable[[Task], RolloutRequest],
    reward_names: Collection[str],
) -> RolloutRequest | TrainGroup | str:
    """What there is to do with one event, or why there is nothing."""
    match event:
        case Task():
            if event.reward not in reward_names:
                return f"reward {event.reward!r} is not registered in this run"
            return task_request(event, request, train)
        case Trajectory():
            return _stale(event, adapter, lineage, train) or _trajectory_group(
                event, chat, dims, train
            )
        case Demonstration():
            return _logged_group(
                event, chat.completion_ids(event.completion), None, None, chat, train
            )
    raise AssertionError(f"{event!r} is not something to learn from")


def _stale(
    event: Trajectory, adapter: AdapterState, lineage: Sequence[int], train: TrainSettings
) -> str:
    """Why a logged trajectory's revision rules it out; empty if it doesn't."""
    if not adapter.exists(event.revision):
        return f"revision {event.revision} does not exist"
    if event.revision not in lineage:
        return f"revision {event.revision} is not an ancestor of the tip {adapter.tip}"
    if (age := lineage.index(event.revision)) > train.max_staleness:
        return (
            f"stale: revision {event.revision} is {age} updates old, at most {train.max_staleness}"
        )
    return ""


def _trajectory_group(
    event: Trajectory, chat: Chat, dims: BaseDims, train: TrainSettings
) -> TrainGroup | str:
    given = len(event.completion_ids) > 0
    ids = (
        np.asarray(event.completion_ids, np.int32)
        if given
        else chat.completion_ids(event.completion)
    )
    if int(ids.max()) >= chat.num_tokens:
        return f"completion_ids go up to {ids.max()}; this base has {chat.num_tokens} tokens"
    logprobs = np.asarray(event.logprobs, np.float32) if len(event.logprobs) else None
    expert_ids: ExpertIds | None = None
    if len(event.expert_ids):
        given_ids = np.asarray(event.expert_ids, np.int64)
        expected = (dims.num_moe_layers, dims.experts_per_token)
        if given_ids.shape[1:] != expected:
            return (
                f"expert_ids have shape {given_ids.shape[1:]} per token; this base has {expected}"
            )
        # An id that this base doesn't have can't be mapped: its position routes natively, out of
        # the loss.
        expert_ids = np.where(
            (given_ids >= 0) & (given_ids < dims.num_experts), given_ids, -1
        ).astype(np.int16)
    return _logged_group(event, ids, logprobs, expert_ids, chat, train)


def _logged_group(
    event: Trajectory | Demonstration,
    completion_ids: np.ndarray[tuple[int], np.dtype[np.int32]],
    logprobs: np.ndarray[tuple[int], np.dtype[np.float32]] | None,
    expert_ids: ExpertIds | None,
    chat: Chat,
    train: TrainSettings,
) -> TrainGroup | str:
    try:
        prompt_ids = chat.prompt_ids(event.prompt)
    except Exception as error:  # see task_request
        return f"the base's chat template refuses the prompt: {type(error).__name__}\n{error}"
    room = train.max_sequence_length - len(prompt_ids)
    if room < 1:
        return f"prompt has {len(prompt_ids)} tokens, more than {train.max_sequence_length}"
    if len(completion_ids) > room and train.over_long == "reject":
        return f"over-long: {len(prompt_ids) + len(completion_ids)} tokens, at most {train.max_sequence_length}"
    sample = Sample(
        completion_ids=completion_ids[:room],
        logprobs=None if logprobs is None else logprobs[:room],
        expert_ids=None if expert_ids is None else expert_ids[:room],
        finished=len(completion_ids) <= room,
    )
    reward = event.reward if isinstance(event, Trajectory) else 1.0
    return TrainGroup(
        event_id=str(event.event_id),
        kind="trajectory" if isinstance(event, Trajectory) else "demonstration",
        prompt_ids=prompt_ids,
        prompt_expert_ids=None,
        samples=(ScoredSample(sample=sample, reward=reward, base_logprobs=None),),
    )
