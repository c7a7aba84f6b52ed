"""Who is in which pass of a wave: groups with signal become lessons, lessons become shares of
passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from populace.workers.adapters.slab import Slab
from populace.workers.base.rows import SequenceGroup
from populace.workers.batch import AdapterBatch, AdapterKey
from populace.workers.step.losses import Baseline, LossSettings, WeightedGroup, weigh_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """A group that has something to teach, ready to be packed."""

    weighted: WeightedGroup
    sequence: SequenceGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lesson:
    """What one adapter learns in this wave."""

    key: AdapterKey
    slot: tuple[int, int]
    items: tuple[_Item, ...]
    denominator: int
    """Loss tokens of the whole adapter, over all passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """One adapter's part of one pass."""

    lesson: _Lesson
    items: tuple[_Item, ...]

    @property
    def num_rows(self) -> int:
        return sum(item.sequence.num_rows for item in self.items)


def _prepare(slab: Slab, batch: AdapterBatch, settings: LossSettings) -> tuple[_Lesson, Baseline]:
    """The groups with signal and the baseline afterwards. Clears the adapter's gradient."""
    slot = slab.slots[batch.adapter]
    slab.clear_gradient(batch.adapter)
    before = Baseline(value=slot.state.baseline, num_rewards=slot.state.num_rewards)
    weighted, baseline = weigh_groups(batch.groups, before, settings)
    place = (slot.arena, slot.row)
    items = [_Item(weighted=group, sequence=_sequence(group, place)) for group in weighted]
    # Where every target is masked there is nothing to learn from, momentum or not.
    items = [item for item in items if item.sequence.num_targets]
    denominator = sum(item.sequence.num_targets for item in items)
    return _Lesson(
        key=batch.adapter, slot=place, items=tuple(items), denominator=denominator
    ), baseline


def _sequence(weighted: WeightedGroup, slot: tuple[int, int]) -> SequenceGroup:
    group = weighted.group
    return SequenceGroup(
        slot=slot,
        prompt_ids=group.prompt_ids,
        branches=tuple(scored.sample.completion_ids for scored in group.samples),
        prompt_expert_ids=group.prompt_expert_ids,
        branch_expert_ids=tuple(scored.sample.expert_ids for scored in group.samples),
        temperature=group.temperature,
    )


def _shares(
    lessons: Sequence[_Lesson], max_rows: int, homes: Mapping[AdapterKey, int]
) -> Iterator[tuple[int, list[_Share]]]:
    """(turn, shares) of each pass of the whole group, with at most `max_rows` rows on each shard:
    the i-th shares of all adapters come before any (i+1)-th. `homes`: the shard of each adapter's
    rows."""
    by_turn: dict[int, list[_Share]] = {}
    for lesson in sorted(lessons, key=lambda lesson: lesson.slot):
        for turn, share in enumerate(_split(lesson, max_rows)):
            by_turn.setdefault(turn, []).append(share)
    for turn, shares in sorted(by_turn.items()):
        current: list[_Share] = []
        rows = Counter[int]()
        for share in shares:
            home = homes[share.lesson.key]
            if rows[home] and rows[home] + share.num_rows > max_rows:
                yield turn, current
                current, rows = [], Counter()
            current.append(share)
            rows[home] += share.num_rows
        yield turn, current


def _split(lesson: _Lesson, max_rows: int) -> Iterator[_Share]:
    """An adapter's groups in shares of at most `max_rows` (a single larger group is a share of its
    own)."""
    part: list[_Item] = []
    num_rows = 0
    for item in lesson.items:
        if part and num_rows + item.sequence.num_rows > max_rows:
            yield _Share(lesson=lesson, items=tuple(part))
            part, num_rows = [], 0
        part.append(item)
        num_rows += item.sequence.num_rows
    yield _Share(lesson=lesson, items=tuple(part))
