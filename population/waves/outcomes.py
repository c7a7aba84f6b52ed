"""What becomes of every event of a wave's member. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from populace.population.experience.sealing import LoggedEvent
from populace.population.waves.wave import MemberOutcome, Prepared, WaveMember
from populace.storage.catalog.attempts import Tries
from populace.storage.log.records import EventRef, Failed, SettledEvent
from populace.workers.batch import TrainGroup

MAX_TRIES = 3
"""An event that failed this often, or that this many attempts with it alone didn't survive, is
parked."""


def kind_of(reason: str) -> str:
    """Of the reason of a settled event: parked, no signal, not finite, stale or rejected."""
    if reason.startswith(("parked", "stale")):
        return reason.partition(":")[0]
    return {"no signal": "no signal", "gradient not finite": "not finite"}.get(reason, "rejected")


def account_for(
    member: WaveMember,
    prepared: Prepared,
    scored: Mapping[tuple[str, str], TrainGroup | str],
    failures: Tries | None,
    settle: Callable[[LoggedEvent, str], SettledEvent],
) -> MemberOutcome:
    """`scored`: groups of tasks by (user, event), or why the reward failed; `failures`: the event
    that failed before, and how often."""
    settled_before = {item.event.position: item for item in prepared.settled}
    groups: list[TrainGroup] = []
    trained: list[EventRef] = []
    settled: list[SettledEvent] = []
    failed: Failed | None = None
    for logged in member.events:
        found = scored.get((member.pseudonym, logged.event_id)) or prepared.groups.get(
            logged.event_id
        )
        if (gone := settled_before.get(logged.ref.position)) is not None:
            settled.append(gone)
        elif isinstance(found, TrainGroup):
            groups.append(found)
            trained.append(logged.ref)
        else:
            assert found is not None
            num_failures = 1 + (
                failures.count if failures is not None and failures.event == logged.ref else 0
            )
            if num_failures < MAX_TRIES:
                # Its later events wait with it: a user's experience is consumed in order.
                failed = Failed(
                    pseudonym=member.pseudonym, event=logged.ref, reason=found.partition("\n")[0]
                )
                break
            settled.append(settle(logged, f"parked: failed {num_failures} times: {found}"))
    end = None if failed is None else failed.event.position
    rejected = [item for item in member.rejected if end is None or item.event.position < end]
    positions = [ref.position for ref in trained] + [
        item.event.position for item in [*settled, *rejected]
    ]
    return MemberOutcome(
        member=member,
        groups=tuple(groups),
        trained=tuple(trained),
        settled=(*rejected, *settled),
        consumed=max(positions, default=None),
        failed=failed,
    )
