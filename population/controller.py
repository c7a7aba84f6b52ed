"""The loop that keeps a population learning.

    enqueue -> experience log -> pending index -> form_wave -> page in -> roll out -> score -> train
                                                                                               |
                                        evaluate <- apply to the catalog <- commit <-----------+

`run_once` is this picture. Every stage is a call that returns a value to it; no stage calls the next one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import fmean

from populace.configs.load import settings_as_dict
from populace.configs.schema import Settings
from populace.population.chat import Chat
from populace.population.exams import Examiner
from populace.population.ledger import Ledger
from populace.population.prepare import Prepared, prepare_member
from populace.population.scheduler import Budget, Wave, WaveMember, form_wave
from populace.population.trials import Rollout, Score, Trials, Workers, tip_ref
from populace.storage.commit import RevisionDraft
from populace.storage.errors import PopulaceError
from populace.storage.loading import blob_context
from populace.storage.records import AdapterCreated, Attempt, Record, Settled, SettledEvent, Tombstone, Verdict
from populace.storage.repack import RetentionRule
from populace.storage.states import AdapterState
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    AdapterUpdate,
    ScoredSample,
    StepResult,
    TrainGroup,
    WaveBatch,
    encode_evidence,
)
from populace.workers.layout import AdapterSpec

MAX_LONE_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveReport:
    """What one turn of the loop did."""

    wave: str
    num_adapters: int
    num_revisions: int
    num_settled: int
    num_tokens: int
    mean_reward: float | None
    out_of_route: float | None
    """Share of replayed selections that the trainer's own gates would have made otherwise; None without any."""
    verdicts: tuple[Verdict, ...]
    seconds: Mapping[str, float]
    """Stage -> wall time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollouts:
    """Rewarded rollouts by (user, event), and the events whose reward failed."""

    groups: dict[tuple[str, str], TrainGroup]
    failed: dict[tuple[str, str], str]


class Controller:
    """Owns the population's partitions while it lives. `ledger` must be claimed."""

    def __init__(self, settings: Settings, ledger: Ledger, workers: Workers, chat: Chat, score: Score) -> None:
        self.settings, self.ledger, self.workers, self.chat = settings, ledger, workers, chat
        self.trials = Trials(settings, workers, chat, score)
        self.examiner = Examiner(self.trials, ledger)
        self.meet_workers()
        self.num_waves = 0
        self._suspects: dict[str, tuple[int, int]] = {}
        self.suspect_unfinished()

    def run_once(self) -> WaveReport | None:
        """One wave from pending experience to committed revisions; None when nobody has any."""
        clock = _Clock()
        self.ledger.read_experience()
        self._obey_commands()
        self._park_killers()
        budget = Budget(
            max_adapters=self.settings.scheduler.max_adapters_per_wave,
            events_per_update=self.settings.scheduler.events_per_update,
        )
        wave = form_wave(self.ledger.pending.queues.values(), budget, alone=self._suspected_users())
        if wave is None:
            return None
        adapters = self._admit(wave)
        clock.lap("form")
        self.workers.page_in([tip_ref(adapters[member.pseudonym]) for member in wave.members], True)
        clock.lap("page")
        prepared = [self._prepare(member, adapters[member.pseudonym]) for member in wave.members]
        rollouts = self.trials.roll_out([request for item in prepared for request in item.requests])
        clock.lap("rollout")
        scored = self._score(rollouts, {member.pseudonym: member for member in wave.members})
        clock.lap("score")
        batch, settled = self._batch(wave, prepared, scored)
        try:
            result = self.workers.train_wave(batch)
            clock.lap("train")
            num_revisions, num_settled = self._commit(wave, batch, result, settled)
        except BaseException:
            # A slot whose commit isn't known is dirty: whatever is in it must not be trained on or served.
            with contextlib.suppress(PopulaceError):
                self.workers.evict([item.adapter for item in batch.adapters])
            raise
        clock.lap("commit")
        self.num_waves += 1
        verdicts: list[Verdict] = []
        if self.num_waves % self.settings.evaluation.every_waves == 0:
            verdicts = self.examiner.evaluate()
            clock.lap("evaluate")
        if self.num_waves % self.settings.retention.every_waves == 0:
            self.ledger.repack(RetentionRule(last=self.settings.retention.last))
            clock.lap("repack")
        self.ledger.checkpoint(self.settings.run.checkpoint_every_records)
        return _report(wave, result, num_revisions, num_settled, verdicts, clock.seconds)

    def meet_workers(self) -> None:
        """Learn what computes: also after a group was started again, maybe on other machines."""
        self.dims, self.numerics = self.workers.describe()

    def suspect_unfinished(self) -> None:
        """Try the events of attempts that died with their controller, or with the shards, one user at a time."""
        # Each user's last event that was tried.
        self._suspects = {
            pseudonym: max(ref.position for ref in refs)
            for attempt in self.ledger.catalog.unfinished.values()
            for pseudonym, refs in attempt.adapters.items()
            if refs
        }

    def _obey_commands(self) -> None:
        """Commands come between two waves; the workers must not keep what is forgotten."""
        forgotten = [done.pseudonym for done in self.ledger.obey_commands() if isinstance(done, Tombstone)]
        if forgotten:
            self.workers.forget(forgotten)

    def _suspected_users(self) -> frozenset[str]:
        """Users whose next event is one that was being tried when a controller died."""
        queues = self.ledger.pending.queues
        return frozenset(
            pseudonym
            for pseudonym, last in self._suspects.items()
            if pseudonym in queues and any(item.ref.position <= last for item in queues[pseudonym].pending[:1])
        )

    def _park_killers(self) -> None:
        """Settle an event whose attempts died alone too often: it is what kills the controller."""
        for pseudonym, (ref, num_deaths) in list(self.ledger.catalog.lone_attempts.items()):
            if num_deaths >= MAX_LONE_ATTEMPTS:
                reason = f"parked: {num_deaths} attempts with this event alone did not survive"
                queue = self.ledger.pending.queues[pseudonym]
                settled = [
                    SettledEvent(event=logged.ref, reason=why)
                    for logged, why in queue.rejected
                    if logged.ref.position < ref.position
                ]
                settled.append(SettledEvent(event=ref, reason=reason))
                record = Settled(pseudonym=pseudonym, events=settled, consumed=ref.position)
                self.ledger.append(self.ledger.catalog.require(pseudonym).partition, record)
        self.ledger.pending.trim(self.ledger.catalog)

    def _admit(self, wave: Wave) -> dict[str, AdapterState]:
        """Create the adapters that don't exist yet, and log which events are about to be tried."""
        settings, catalog = self.settings.adapter, self.ledger.catalog
        records: list[tuple[int, Record]] = []
        for member in wave.members:
            if member.pseudonym not in catalog:
                spec = AdapterSpec(
                    rank=self.settings.user_ranks.get(member.user, settings.rank),
                    expert_rank=settings.expert_rank,
                    alpha=settings.alpha,
                    learning_rate=settings.learning_rate,
                    b_learning_rate_ratio=settings.b_learning_rate_ratio,
                )
                seed = self.ledger.mask_seed(member.pseudonym, self.ledger.meta.adapter_seed(member.user))
                created = AdapterCreated(pseudonym=member.pseudonym, spec=spec.as_dict(), seed=seed)
                records.append((member.partition, created))
        for partition, members in _by_partition(wave).items():
            tried = {member.pseudonym: [event.ref for event in member.events] for member in members}
            records.append((partition, Attempt(wave=wave.wave_id, num_adapters=len(wave.members), adapters=tried)))
        self.ledger.append_all(records)
        return {member.pseudonym: catalog.require(member.pseudonym) for member in wave.members}

    def _prepare(self, member: WaveMember, adapter: AdapterState) -> Prepared:
        return prepare_member(
            member,
            adapter,
            settle=self.ledger.seals.settled,
            chat=self.chat,
            dims=self.dims,
            train=self.settings.train,
            request=self.trials.requester(AdapterKey(adapter.pseudonym, adapter.tip)),
            reward_names=self.settings.rewards.functions,
        )

    def _score(self, rollouts: Sequence[Rollout], members: Mapping[str, WaveMember]) -> ScoredRollouts:
        requests = []
        for group, base in rollouts:
            member = members[group.adapter.pseudonym]
            logged = next(item for item in member.events if item.event.event_id == group.event_id)
            requests.append(self.trials.reward_request(logged, self.trials.replies(logged, group, base)))
        groups, failed = {}, {}
        outcomes = self.trials.judge(requests)
        for (group, base), outcome in zip(rollouts, outcomes, strict=True):
            name = (group.adapter.pseudonym, group.event_id)
            if isinstance(outcome, str):
                failed[name] = outcome
                continue
            groups[name] = TrainGroup(
                event_id=group.event_id,
                kind="task",
                prompt_ids=group.prompt_ids,
                prompt_expert_ids=group.prompt_expert_ids,
                samples=tuple(
                    ScoredSample(sample=sample, reward=reward, base_logprobs=logprobs)
                    for sample, reward, logprobs in zip(group.samples, outcome, base, strict=True)
                ),
                temperature=group.temperature,
            )
        return ScoredRollouts(groups=groups, failed=failed)

    def _batch(
        self, wave: Wave, prepared: Sequence[Prepared], scored: ScoredRollouts
    ) -> tuple[WaveBatch, dict[str, list[SettledEvent]]]:
        """Every adapter's groups in the order of its events, and the events that fell out with their reasons."""
        batches, settled = [], {}
        for member, item in zip(wave.members, prepared, strict=True):
            groups, out = [], [*member.rejected, *item.settled]
            for logged in member.events:
                name = (member.pseudonym, logged.event.event_id)
                if name in scored.failed:
                    out.append(self.ledger.seals.settled(logged, scored.failed[name]))
                elif (group := scored.groups.get(name) or item.groups.get(logged.event.event_id)) is not None:
                    groups.append(group)
            settled[member.pseudonym] = out
            batches.append(AdapterBatch(adapter=item.adapter, groups=tuple(groups)))
        return WaveBatch(adapters=tuple(batches)), settled

    def _commit(
        self, wave: Wave, batch: WaveBatch, result: StepResult, settled: dict[str, list[SettledEvent]]
    ) -> tuple[int, int]:
        """Partition by partition: one atomic record for the new revisions, one per user without any. Returns
        the numbers of revisions and of settled events."""
        updates = {update.adapter.pseudonym: update for update in result.updates}
        groups = {item.adapter.pseudonym: item.groups for item in batch.adapters}
        renamed, num_settled = [], 0
        for partition, members in _by_partition(wave).items():
            drafts, without = [], []
            for member in members:
                update, out = updates[member.pseudonym], settled[member.pseudonym]
                if update.status == "updated":
                    drafts.append(self._draft(member, update, groups[member.pseudonym], out))
                    num_settled += len(out)
                else:
                    without.append(_settled(member, update.status, out))
            num_settled += sum(len(record.events) for record in without)
            self.ledger.append_all([(partition, record) for record in without])
            if drafts:
                self._commit_drafts(partition, wave.wave_id, drafts)
                renamed += [
                    (
                        AdapterKey(draft.pseudonym, draft.parent),
                        AdapterKey(draft.pseudonym, draft.revision),
                    )
                    for draft in drafts
                ]
        self.workers.committed(renamed)
        return len(renamed), num_settled

    def _commit_drafts(self, partition: int, wave_id: str, drafts: Sequence[RevisionDraft]) -> None:
        owner = self.ledger.owner(partition)
        header, manifest = owner.commit_wave(
            wave_id,
            drafts,
            parameters={
                "algorithm": "grpo+reinforce+sft",
                **{part: settings_as_dict(self.settings)[part] for part in ("train", "optimizer", "rollout")},
                "seed": self.ledger.meta.seed,
            },
            materials={
                "base": self.ledger.meta.base_digest,
                "chat_template": self.chat.template_digest(),
            },
            numerics={**self.numerics, "populace": version("populace")},
        )
        self.ledger.catalog.apply(header, manifest)

    def _draft(
        self,
        member: WaveMember,
        update: AdapterUpdate,
        groups: Sequence[TrainGroup],
        settled: list[SettledEvent],
    ) -> RevisionDraft:
        adapter = self.ledger.catalog.require(member.pseudonym)
        parent = adapter.revision(adapter.tip).blobs if adapter.tip else {}
        out = {item.event.position for item in settled}
        revision, keys = adapter.next_revision, self.ledger.keys
        parts = {"weights": update.weights, "moments": update.moments, "evidence": encode_evidence(groups)}
        return RevisionDraft(
            pseudonym=member.pseudonym,
            revision=revision,
            parent=adapter.tip,
            parent_sha256=parent["weights"].sha256 if parent else None,
            parent_moments_sha256=parent["moments"].sha256 if "moments" in parent else None,
            blobs={
                part: keys.seal(member.pseudonym, blob, blob_context(part, revision)) for part, blob in parts.items()
            },
            experts=list(update.experts),
            trained=[item.ref for item in member.events if item.ref.position not in out],
            settled=settled,
            consumed=member.consumed,
            metrics=update.metrics,
        )


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = now - self._last
        self._last = now


def _settled(member: WaveMember, status: str, settled: list[SettledEvent]) -> Settled:
    """The record of a user whose events end without a revision."""
    reason = {"no_signal": "no signal", "non_finite": "gradient not finite"}[status]
    out = {item.event.position for item in settled}
    rest = [SettledEvent(event=item.ref, reason=reason) for item in member.events if item.ref.position not in out]
    return Settled(pseudonym=member.pseudonym, events=[*settled, *rest], consumed=member.consumed)


def _by_partition(wave: Wave) -> dict[int, list[WaveMember]]:
    members: dict[int, list[WaveMember]] = {}
    for member in wave.members:
        members.setdefault(member.partition, []).append(member)
    return members


def _report(
    wave: Wave,
    result: StepResult,
    num_revisions: int,
    num_settled: int,
    verdicts: Sequence[Verdict],
    seconds: Mapping[str, float],
) -> WaveReport:
    rewards = [update.metrics["reward"] for update in result.updates if "reward" in update.metrics]
    return WaveReport(
        wave=wave.wave_id,
        num_adapters=len(wave.members),
        num_revisions=num_revisions,
        num_settled=num_settled,
        num_tokens=int(sum(update.metrics.get("tokens", 0) for update in result.updates)),
        mean_reward=fmean(rewards) if rewards else None,
        out_of_route=result.out_of_route[0] / result.out_of_route[1] if result.out_of_route[1] else None,
        verdicts=tuple(verdicts),
        seconds=dict(seconds),
    )
