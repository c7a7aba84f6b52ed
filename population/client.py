"""`Population`: the public Python API.

    population = Population.create("build/store", name="demo", base="smollm2-moe", rewards={...})
    population.enqueue("ada", [Task(prompt="What is rain?", reward="short")])

Enqueueing needs no running trainer; `populace run` (or `run.run_population`) is what trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from populace.configs.schema import RolloutSettings, Settings, problems
from populace.population.chat import Chat
from populace.population.experience import (
    LogEvent,
    Messages,
    Rollback,
    check_event,
    check_prompt,
    check_user,
    encode_event,
)
from populace.population.ledger import Ledger, PopulationMeta, check_name, verify_digest
from populace.population.stream import partition_of
from populace.population.trials import revision_ref
from populace.storage.catalog import AdapterState
from populace.storage.commit import RevisionLogReader
from populace.storage.errors import InvalidInput, OwnerAlive
from populace.storage.manifest import payload_of
from populace.storage.objects import ObjectStore, open_store
from populace.storage.pack import read_blob
from populace.storage.probe import require_safe
from populace.workers.batch import AdapterKey, RolloutRequest
from populace.workers.engine import ShardEngine, ShardSettings
from populace.workers.losses import LossSettings
from populace.workers.prepare import PreparedBase, find_base, find_prepared
from populace.workers.train_step import TrainerSettings

_ROWS_PER_SEGMENT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class PopulationStatus:
    """Counts over the whole population, from the logs alone."""

    name: str
    base: str
    users: int
    adapters: int
    revisions: int
    promoted: int
    rejected: int
    pending_events: int
    heldout_tasks: int
    settled_events: int
    running: bool
    """Whether a controller holds the partitions, or died without releasing them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionInfo:
    """One revision of one adapter."""

    revision: int
    parent: int | None
    is_tip: bool
    is_serving: bool
    num_events: int
    metrics: Mapping[str, float]
    verdicts: tuple[str, ...]


class Population:
    """A population in a store. Opening reads its logs; nothing here writes a revision log without saying so."""

    def __init__(self, settings: Settings, store: ObjectStore, meta: PopulationMeta) -> None:
        self.settings, self.store, self.meta = settings, store, meta
        self.ledger = Ledger(store, meta)
        self._engine: ShardEngine | None = None

    @staticmethod
    def create(store: str | ObjectStore, settings: Settings | None = None, **fields: Any) -> Population:
        """Make a population, or open it when it is there. `fields` are fields of `Settings`, e.g. `name=`."""
        settings = _settings(settings, fields)
        check_name(settings.name)
        opened = open_store(store) if isinstance(store, str) else store
        base = find_base(settings.base.model)
        require_safe(opened, settings.name, make_bucket=True)
        meta = PopulationMeta.find(opened, settings.name) or PopulationMeta.create(
            opened,
            name=settings.name,
            base=base.name if find_prepared(base.name) == base else base.folder,
            base_digest=base.digest,
            partitions=settings.partitions,
            seed=settings.seed,
            heldout_share=settings.evaluation.heldout_share,
        )
        verify_digest(meta, base.digest)
        return Population(settings, opened, meta)

    @staticmethod
    def open(store: str | ObjectStore, settings: Settings | None = None, **fields: Any) -> Population:
        """Open an existing population; `InvalidInput` if there is none."""
        settings = _settings(settings, fields)
        opened = open_store(store) if isinstance(store, str) else store
        meta = PopulationMeta.find(opened, check_name(settings.name))
        if meta is not None:
            require_safe(opened, settings.name)
        else:
            raise InvalidInput(
                f"no population {settings.name!r} in {opened.url}; create it with `populace run CONFIG` "
                "or Population.create"
            )
        return Population(settings, opened, meta)

    def enqueue(self, user: str, events: Iterable[LogEvent]) -> int:
        """Make a user's events durable, in order; returns their number. All are checked before any is written.
        Sending an event again (same id, same content) is harmless."""
        return self.enqueue_many([(user, events)])

    def enqueue_many(self, pairs: Iterable[tuple[str, Iterable[LogEvent]]]) -> int:
        """`enqueue` for many users at once; their events share segments."""
        rows = []
        for user, events in pairs:
            check_user(user)
            if not isinstance(events, Iterable):
                raise InvalidInput(f"events of user {user!r} are {events!r}; give a list of events")
            for event in events:
                check_event(event, self.settings.rewards.functions)
                rows.append(encode_event(user, event))
        self._append(rows)
        return len(rows)

    def _append(self, encoded: Iterable[dict[str, str]]) -> None:
        by_partition: dict[int, list[dict[str, str]]] = {}
        for row in encoded:
            by_partition.setdefault(partition_of(row["user"], self.meta.partitions), []).append(row)
        for partition, rows in sorted(by_partition.items()):
            for start in range(0, len(rows), _ROWS_PER_SEGMENT):
                self.ledger.experience[partition].append(rows[start : start + _ROWS_PER_SEGMENT])

    def status(self) -> PopulationStatus:
        self.ledger.refresh()
        catalog, queues = self.ledger.catalog, self.ledger.pending.queues.values()
        decisions = [record.decision for adapter in catalog for record in adapter.verdicts]
        return PopulationStatus(
            name=self.meta.name,
            base=self.meta.base,
            users=len(queues),
            adapters=len(catalog.adapters),
            revisions=sum(len(adapter.revisions) for adapter in catalog),
            promoted=decisions.count("promote"),
            rejected=decisions.count("reject"),
            pending_events=self.ledger.pending.num_pending(),
            heldout_tasks=sum(len(queue.heldout) for queue in queues),
            settled_events=sum(len(adapter.settled) for adapter in catalog),
            running=any(catalog.owned.values()),
        )

    def users(self) -> list[str]:
        """Users who have sent anything."""
        self.ledger.refresh()
        return sorted(self.ledger.users().values())

    def revisions(self, user: str) -> list[RevisionInfo]:
        """A user's revisions from 0 on."""
        self.ledger.refresh()
        adapter = self.ledger.adapter(user)
        return [_info(adapter, revision) for revision in [0, *sorted(adapter.revisions)]]

    def manifest(self, user: str, revision: int) -> dict[str, Any]:
        """The payload of the record that committed a revision."""
        self.ledger.refresh()
        adapter = self.ledger.adapter(user)
        if adapter.require(revision) == 0:
            raise InvalidInput("revision 0 has no manifest: it is the initialisation from the adapter's seed")
        reader = RevisionLogReader(self.store, self.meta.name, adapter.partition)
        sealed = reader.log.read(adapter.waves[revision])
        assert sealed is not None
        return payload_of(sealed)

    def verify(self, user: str) -> int:
        """Read every blob of a user's revisions against its digest; returns how many. Raises `Damaged`."""
        self.ledger.refresh()
        adapter, num_blobs = self.ledger.adapter(user), 0
        for entry in adapter.revisions.values():
            adapter.lineage(entry.revision)
            for place in entry.blobs.values():
                read_blob(self.store, place)
                num_blobs += 1
        return num_blobs

    def rollback(self, user: str, to: int) -> None:
        """Move a user's tip and serving to revision `to`. A running controller obeys between two waves; with
        none alive, this claims the population, does it, and releases it."""
        self.ledger.refresh()
        adapter = self.ledger.adapter(check_user(user))
        adapter.require(to)
        self._append([encode_event(user, Rollback(to=to))])
        claiming = Ledger(self.store, self.meta)
        try:
            claiming.claim(self.settings.run.takeover_s)
        except OwnerAlive:
            return
        try:
            claiming.obey_commands()
        finally:
            claiming.release()

    def sample(
        self,
        user: str,
        messages: str | Messages,
        revision: int | str = "serving",
        rollout: RolloutSettings | None = None,
    ) -> str:
        """An answer of a user's adapter: `serving`, `tip`, or a revision number. A user without an adapter gets
        the base's answer."""
        self.ledger.refresh()
        check_user(user)
        check_prompt("sample", messages)
        rollout = rollout or self.settings.rollout
        engine, chat = self._local_engine()
        adapter = self.ledger.catalog.get(self.meta.pseudonym(user))
        if adapter is None:
            adapter = AdapterState(
                pseudonym=self.meta.pseudonym(user),
                partition=partition_of(user, self.meta.partitions),
                spec=_default_spec(self.settings),
                seed=self.meta.adapter_seed(user),
            )
        number = revision_number(adapter, revision)
        engine.page_in([revision_ref(adapter, number)], False)
        request = RolloutRequest(
            adapter=AdapterKey(adapter.pseudonym, number),
            event_id="sample",
            prompt_ids=chat.prompt_ids(messages),
            num_samples=1,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
        )
        (group,) = engine.roll_out([request])
        return chat.text(group.samples[0].completion_ids)

    def base(self) -> PreparedBase:
        """The base of this population, checked against its digest."""
        base = find_base(self.settings.base.model)
        verify_digest(self.meta, base.digest)
        return base

    def shard_settings(self, base: PreparedBase, chat: Chat) -> ShardSettings:
        """How the workers of this population start."""
        train = self.settings.train
        return ShardSettings(
            base_folder=base.folder,
            dtype=self.settings.base.dtype,
            store_url=self.store.url,
            slots=self.settings.scheduler.slots,
            threads=self.settings.run.threads,
            eos_ids=chat.eos_ids,
            trainer=TrainerSettings(
                backend=train.backend,
                max_rows_per_pass=train.max_rows_per_pass,
                beta1=train.beta1,
                beta2=train.beta2,
                epsilon=train.epsilon,
                weight_decay=train.weight_decay,
                max_grad_norm=train.max_grad_norm,
                loss=LossSettings(
                    kl_coefficient=train.kl_coefficient,
                    kl_in_reward=train.kl_in == "reward",
                    importance_cap=train.importance_cap,
                    baseline_decay=train.baseline_decay,
                ),
            ),
        )

    def _local_engine(self) -> tuple[ShardEngine, Chat]:
        base = self.base()
        chat = Chat(base.folder)
        if self._engine is None:
            self._engine = ShardEngine(self.shard_settings(base, chat), self.store)
        return self._engine, chat


def _settings(settings: Settings | None, fields: Mapping[str, Any]) -> Settings:
    unknown = set(fields) - set(Settings.__dataclass_fields__)
    if unknown:
        raise InvalidInput(f"unknown settings {sorted(unknown)}; see configs/schema.py for all of them")
    settings = dataclasses.replace(settings or Settings(), **fields)
    if found := problems(settings):
        raise InvalidInput("; ".join(found))
    return settings


def _default_spec(settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(settings.adapter)


def revision_number(adapter: AdapterState, revision: int | str) -> int:
    match revision:
        case "serving":
            return adapter.serving
        case "tip":
            return adapter.tip
        case int():
            return adapter.require(revision)
        case _ if str(revision).isdigit():
            return adapter.require(int(revision))
    raise InvalidInput(f"revision is {revision!r}; use serving, tip or a number")


def _info(adapter: AdapterState, revision: int) -> RevisionInfo:
    entry = adapter.revisions.get(revision)
    return RevisionInfo(
        revision=revision,
        parent=None if entry is None else entry.parent,
        is_tip=revision == adapter.tip,
        is_serving=revision == adapter.serving,
        num_events=0 if entry is None else len(entry.trained),
        metrics={} if entry is None else entry.metrics,
        verdicts=tuple(record.decision for record in adapter.verdicts if record.judged == revision),
    )
