"""What one turn of the loop did, and where its time went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from populace.population.waves.outcomes import kind_of
from populace.population.waves.wave import REASONS_WITHOUT_UPDATE, MemberOutcome, Wave
from populace.storage.log.records import Settled, Tombstone, Verdict
from populace.workers.batch import Paging, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveReport:
    """What one turn of the loop did."""

    wave: str
    num_adapters: int
    num_revisions: int
    num_trained: int
    """Events that revisions learned from."""
    settled: Mapping[str, int]
    """Kind of reason -> events that ended without being trained on, also those between the last
    wave and this one."""
    num_tokens: int
    """Of completions."""
    num_targets: int
    """Tokens that the step learned from: those of completions with signal."""
    num_rows: int
    """That went through the base in the fused step, prompts and padding included."""
    mean_reward: float | None
    rollout_kl: float | None
    """KL(rollout || trainer) per token, over the wave's tokens; None when nothing was sampled."""
    masked_share: float | None
    """Of the wave's tokens, those left out because their routing is unknown."""
    out_of_route: float | None
    """Share of replayed selections that the trainer's own gates would have made otherwise; None
    without any."""
    verdicts: tuple[Verdict, ...]
    answered: tuple[Verdict | Tombstone, ...]
    """Commands obeyed since the last wave."""
    seconds: Mapping[str, float]
    """Stage -> wall time that this turn spent in it; what other waves' stages took beside it isn't
    in here."""
    paging: Paging
    """Where the wave's adapters were found."""


def change_of(record: Verdict | Tombstone) -> str:
    """What a decision or command did to an adapter, in one word."""
    return "forgotten" if isinstance(record, Tombstone) else record.decision


class Clock:
    """Where a turn's time goes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()
        self._marked: float | None = None

    def mark(self) -> None:
        """Something that was waited for is done."""
        self._marked = time.monotonic()

    def lap_up_to_mark(self, before: str, after: str) -> None:
        """Time up to the mark counts as `before`, time behind it as `after`; all of it as `before`
        without a mark."""
        now = time.monotonic()
        waited = 0.0 if self._marked is None else max(0.0, now - max(self._marked, self._last))
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self._last - waited
        self.seconds[after] = self.seconds.get(after, 0.0) + waited
        self._last = now

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def report_of(
    wave: Wave,
    paging: Paging,
    outcomes: Sequence[MemberOutcome],
    result: StepResult,
    verdicts: Sequence[Verdict],
    between: Sequence[Verdict | Tombstone | Settled],
    seconds: Mapping[str, float],
) -> WaveReport:
    """What a wave did. `between`: what was written since the last report, beside waves."""
    rewards = [update.metrics["reward"] for update in result.updates if "reward" in update.metrics]
    reasons = [
        item.reason for record in between if isinstance(record, Settled) for item in record.events
    ]
    num_trained = 0
    for outcome, update in zip(outcomes, result.updates, strict=True):
        reasons += [item.reason for item in outcome.settled]
        if update.status == "updated":
            num_trained += len(outcome.trained)
        else:
            reasons += [REASONS_WITHOUT_UPDATE[update.status]] * len(outcome.trained)
    return WaveReport(
        wave=wave.wave_id,
        num_adapters=len(wave.members),
        num_revisions=sum(update.status == "updated" for update in result.updates),
        num_trained=num_trained,
        settled=Counter(map(kind_of, reasons)),
        num_tokens=int(sum(update.metrics.get("tokens", 0) for update in result.updates)),
        num_targets=int(sum(update.metrics.get("targets", 0) for update in result.updates)),
        num_rows=result.num_rows,
        mean_reward=fmean(rewards) if rewards else None,
        rollout_kl=_mean_over_tokens(result, "rollout_kl"),
        masked_share=_mean_over_tokens(result, "masked_share"),
        out_of_route=result.out_of_route[0] / result.out_of_route[1]
        if result.out_of_route[1]
        else None,
        verdicts=tuple(verdicts),
        answered=tuple(record for record in between if not isinstance(record, Settled)),
        seconds=dict(seconds),
        paging=paging,
    )


def _mean_over_tokens(result: StepResult, name: str) -> float | None:
    """A metric of the adapters that have it, weighted by their tokens."""
    known = [update.metrics for update in result.updates if name in update.metrics]
    num_tokens = sum(metrics["tokens"] for metrics in known)
    return (
        sum(metrics[name] * metrics["tokens"] for metrics in known) / num_tokens
        if num_tokens
        else None
    )
