"""What becomes of every event of a wave's member. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from populace.population.experience.sealing import Reason, Settlement
from populace.population.waves.rewards import RewardOutcome
from populace.population.waves.wave import MemberOutcome, PlannedMember, Rollout
from populace.storage.catalog.attempts import Tries
from populace.storage.log.records import EventRef, Failed, ReasonKind
from populace.workers.batch import ExperienceKind, ScoredSample, TrainGroup

MAX_TRIES = 3
"""An event that failed this often, or that this many attempts with it alone didn't survive, is
parked."""

Scored = TrainGroup | Reason
"""A task after its reward ran: ready to train on, or why its reward failed."""


def scored_group(rollout: Rollout, outcome: RewardOutcome) -> Scored:
    """A rollout with its rewards, or why there are none."""
    if isinstance(outcome, Reason):
        return outcome
    group = rollout.group
    return TrainGroup(
        event_id=group.event_id,
        kind=ExperienceKind.TASK,
        prompt_ids=group.prompt_ids,
        prompt_expert_ids=group.prompt_expert_ids,
        samples=tuple(
            ScoredSample(sample=sample, reward=reward, base_logprobs=logprobs)
            for sample, reward, logprobs in zip(
                group.samples, outcome, rollout.base_logprobs, strict=True
            )
        ),
        temperature=group.temperature,
    )


def account_for(
    planned: PlannedMember, scored: Mapping[str, Scored], failures: Tries | None
) -> MemberOutcome:
    """Train, settle or fail each event of a member, in order. A user's experience is consumed in
    order: what comes after an event that may be tried again waits with it.

    `scored`: the member's tasks by event id. `failures`: the event of this user that failed before,
    and how often."""
    groups: list[TrainGroup] = []
    trained: list[EventRef] = []
    settled: list[Settlement] = []
    failed: Failed | None = None
    for prepared in planned.events:
        logged = prepared.logged
        if isinstance(prepared.next, Reason):
            settled.append(Settlement(logged=logged, reason=prepared.next))
            continue
        found = prepared.next if isinstance(prepared.next, TrainGroup) else scored[logged.event_id]
        if isinstance(found, TrainGroup):
            groups.append(found)
            trained.append(logged.ref)
            continue
        before = failures.count if failures is not None and failures.event == logged.ref else 0
        if before + 1 < MAX_TRIES:
            failed = Failed(pseudonym=logged.pseudonym, event=logged.ref, reason=found.text)
            break
        settled.append(Settlement(logged=logged, reason=_parked(found, before + 1)))
    end = None if failed is None else failed.event.position
    rejected = [
        item for item in planned.member.rejected if end is None or item.logged.ref.position < end
    ]
    settled = [*rejected, *settled]
    positions = [ref.position for ref in trained]
    positions += [item.logged.ref.position for item in settled]
    return MemberOutcome(
        planned=planned,
        groups=tuple(groups),
        trained=tuple(trained),
        settled=tuple(settled),
        consumed=max(positions, default=None),
        failed=failed,
    )


def _parked(reason: Reason, num_failures: int) -> Reason:
    text = f"parked: failed {num_failures} times: {reason.text}"
    return Reason(kind=ReasonKind.PARKED, text=text, said=reason.said)
