"""What one turn of the loop did, and where its time went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from populace.population.waves.wave import TrainedWave
from populace.storage.log.records import ReasonKind, Settled, Tombstone, Verdict
from populace.workers.batch import Paging


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveReport:
    """What one turn of the loop did."""

    wave: str
    num_adapters: int
    num_revisions: int
    num_trained: int
    """Events that revisions learned from."""
    settled: Mapping[ReasonKind, int]
    """Events that ended without being trained on, also those between the last wave and this
    one."""
    num_tokens: int
    """Tokens of completions."""
    num_targets: int
    """Tokens that the step learned from: those of completions with signal."""
    num_rows: int
    """Rows that went through the base in the fused step, prompts and padding included."""
    mean_reward: float | None
    rollout_kl: float | None
    """KL(rollout || trainer) per token, over the wave's tokens; None when nothing was sampled."""
    masked_share: float | None
    """Share of the wave's tokens that is left out because their routing is unknown."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What is true of a run between two waves, for those who watch it."""

    population: str
    controller: str
    num_waves: int
    """Trained since the run started."""
    num_pending: int
    """Events that wait to be trained on."""
    oldest_wait_s: float
    num_partitions: int
    """Partitions that this controller owns."""
    num_adapters: int
    """Adapters in the store."""
    num_updated: int
    """Adapters with a revision above 0."""


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
    trained: TrainedWave,
    paging: Paging,
    verdicts: Sequence[Verdict],
    between: Sequence[Verdict | Tombstone | Settled],
    seconds: Mapping[str, float],
) -> WaveReport:
    """What a wave did. `between`: what was written since the last report, beside waves."""
    settled = Counter(
        item.kind for record in between if isinstance(record, Settled) for item in record.events
    )
    num_trained = 0
    for member in trained.members:
        settled.update(item.reason.kind for item in member.outcome.settled)
        settled.update(item.kind for item in member.unlearned)
        if member.is_updated:
            num_trained += len(member.outcome.trained)
    metrics = [member.update.metrics for member in trained.members]
    rewards = [own["reward"] for own in metrics if "reward" in own]
    num_out, num_replayed = trained.out_of_route
    return WaveReport(
        wave=trained.wave_id,
        num_adapters=len(trained.members),
        num_revisions=sum(member.is_updated for member in trained.members),
        num_trained=num_trained,
        settled=settled,
        num_tokens=int(sum(own.get("tokens", 0) for own in metrics)),
        num_targets=int(sum(own.get("targets", 0) for own in metrics)),
        num_rows=trained.num_rows,
        mean_reward=fmean(rewards) if rewards else None,
        rollout_kl=_mean_over_tokens(metrics, "rollout_kl"),
        masked_share=_mean_over_tokens(metrics, "masked_share"),
        out_of_route=num_out / num_replayed if num_replayed else None,
        verdicts=tuple(verdicts),
        answered=tuple(record for record in between if not isinstance(record, Settled)),
        seconds=dict(seconds),
        paging=paging,
    )


def _mean_over_tokens(metrics: Sequence[Mapping[str, float]], name: str) -> float | None:
    """A metric of the adapters that have it, weighted by their tokens."""
    known = [own for own in metrics if name in own]
    num_tokens = sum(own["tokens"] for own in known)
    return sum(own[name] * own["tokens"] for own in known) / num_tokens if num_tokens else None
