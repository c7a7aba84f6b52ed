"""Who is in which pass of a wave: groups with signal become an adapter's lesson, and lessons are
cut into shares of passes.

A pass holds whole adapters, or the i-th share of an adapter that is larger than a pass, so that how
an adapter is split never depends on who else is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from populace.configs.schema import TrainSettings
from populace.workers.adapters.slab import Slab
from populace.workers.base.rows import SequenceGroup
from populace.workers.batch import AdapterBatch, AdapterKey
from populace.workers.shards.placement import SlotAddress
from populace.workers.step.losses import Baseline, WeightedGroup, weigh_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What one adapter learns in this wave."""

    key: AdapterKey
    address: SlotAddress
    groups: tuple[WeightedGroup, ...]
    denominator: int
    """Loss tokens of the whole adapter, over all passes."""
    baseline: Baseline
    """Running mean of the user's logged rewards, after these groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One adapter's part of one pass."""

    lesson: Lesson
    groups: tuple[WeightedGroup, ...]

    @property
    def sequences(self) -> list[SequenceGroup]:
        """The groups as they are packed."""
        return [_sequence(group, self.lesson.address) for group in self.groups]

    @property
    def num_rows(self) -> int:
        return sum(sequence.num_rows for sequence in self.sequences)

    @property
    def num_tokens(self) -> int:
        """Tokens of completions: the targets of its rows."""
        samples = [scored.sample for item in self.groups for scored in item.group.samples]
        return sum(len(sample.completion_ids) for sample in samples)


def lesson_of(slab: Slab, batch: AdapterBatch, train: TrainSettings) -> Lesson:
    """An adapter's groups with signal. Holds the slot that it is trained in, with its gradient at
    zero."""
    slot = slab.hold_for_training(batch.adapter)
    before = Baseline(value=slot.state.baseline, num_rewards=slot.state.num_rewards)
    weighted, baseline = weigh_groups(batch.groups, before, train)
    num_targets = [_sequence(group, slot.address).num_targets for group in weighted]
    # Where every target is masked there is nothing to learn from, momentum or not.
    kept = [group for group, count in zip(weighted, num_targets, strict=True) if count]
    return Lesson(
        key=batch.adapter,
        address=slot.address,
        groups=tuple(kept),
        denominator=sum(num_targets),
        baseline=baseline,
    )


def plan_passes(
    lessons: Sequence[Lesson], max_rows: int, homes: Mapping[AdapterKey, int]
) -> Iterator[tuple[int, list[Share]]]:
    """(turn, shares) of each pass of the whole group, with at most `max_rows` rows on each shard:
    the i-th shares of all adapters come before any (i+1)-th. `homes`: the shard of each adapter's
    rows."""
    by_turn: dict[int, list[Share]] = {}
    for lesson in sorted(lessons, key=lambda lesson: lesson.address):
        for turn, share in enumerate(_split(lesson, max_rows)):
            by_turn.setdefault(turn, []).append(share)
    for turn, shares in sorted(by_turn.items()):
        current: list[Share] = []
        rows = Counter[int]()
        for share in shares:
            home = homes[share.lesson.key]
            if rows[home] and rows[home] + share.num_rows > max_rows:
                yield turn, current
                current, rows = [], Counter()
            current.append(share)
            rows[home] += share.num_rows
        yield turn, current


def _split(lesson: Lesson, max_rows: int) -> Iterator[Share]:
    """An adapter's groups in shares of at most `max_rows` (a single larger group is a share of its
    own)."""
    part: list[WeightedGroup] = []
    num_rows = 0
    for group in lesson.groups:
        own_rows = _sequence(group, lesson.address).num_rows
        if part and num_rows + own_rows > max_rows:
            yield Share(lesson=lesson, groups=tuple(part))
            part, num_rows = [], 0
        part.append(group)
        num_rows += own_rows
    yield Share(lesson=lesson, groups=tuple(part))


def _sequence(weighted: WeightedGroup, address: SlotAddress) -> SequenceGroup:
    group = weighted.group
    return SequenceGroup(
        address=address,
        prompt_ids=group.prompt_ids,
        branches=tuple(scored.sample.completion_ids for scored in group.samples),
        prompt_expert_ids=group.prompt_expert_ids,
        branch_expert_ids=tuple(scored.sample.expert_ids for scored in group.samples),
        temperature=group.temperature,
    )
