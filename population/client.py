"""`Population`: the public Python API.

    population = Population.create("build/store", name="demo", base="smollm2-moe", rewards={...})
    population.enqueue("ada", [Task(prompt="What is rain?", reward="short")])

Enqueueing needs no running trainer; `populace run` (or `run.run_population`) is what trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from populace.configs.schema import RolloutSettings, Settings, problems
from populace.population.experience.checks import check_prompt, check_user
from populace.population.experience.consumer import Reading
from populace.population.experience.events import (
    Command,
    Forget,
    LogEvent,
    Messages,
    Pin,
    Rollback,
    estimate_tokens,
)
from populace.population.experience.producer import Producer
from populace.population.experience.segments import partition_of
from populace.population.ledger.ledger import Ledger
from populace.population.ledger.queries import (
    ParkedEvent,
    PopulationStatus,
    RevisionInfo,
    _verdicts,
    parked_events,
    parked_in,
    revision_number,
    settling_records,
)
from populace.population.waves.chat import Chat
from populace.storage.catalog.repack import RepackReport, RetentionRule
from populace.storage.catalog.states import AdapterState, Note, RevisionState
from populace.storage.errors import Forgotten, InvalidInput, ObjectNotFound, OwnerAlive
from populace.storage.identity import PopulationMeta, check_name, verify_digest
from populace.storage.keys.keyring import Keyring, PublicKey
from populace.storage.log.manifest import payload_of
from populace.storage.log.records import Rotate, SettledEvent, Verdict
from populace.storage.log.verify import Findings, verify_partition
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.open import open_store
from populace.storage.objects.probe import require_safe
from populace.workers.actors.engine import ShardEngine, ShardSettings
from populace.workers.adapters.residency import ResidencyBudget
from populace.workers.base.registry import PreparedBase, find_base, find_prepared
from populace.workers.batch import AdapterKey, AdapterRef, RolloutRequest
from populace.workers.shapes import AdapterSpec
from populace.workers.step.numerics import ROW_MULTIPLE
from populace.workers.step.train import TrainerSettings


class Population:
    """A population in a store. Nothing here writes a revision log without saying so."""

    def __init__(self, settings: Settings, store: ObjectStore, meta: PopulationMeta) -> None:
        self.settings, self.store, self.meta = settings, store, meta
        self.producer = Producer(
            store, meta, rewards=settings.rewards.functions, settings=settings.stream
        )
        self._engine: ShardEngine | None = None

    @functools.cached_property
    def ledger(self) -> Ledger:
        """Logs and catalog; who only enqueues needs neither."""
        return Ledger(
            self.store, self.meta, reading=reading_of(self.settings), producer=self.producer
        )

    @staticmethod
    def create(
        store: str | ObjectStore, settings: Settings | None = None, **fields: Any
    ) -> Population:
        """Make a population, or open it when it is there. `fields` are fields of `Settings`, e.g.
        `name=`."""
        settings = _settings(settings, fields)
        check_name(settings.name)
        opened = open_store(store) if isinstance(store, str) else store
        base = find_base(settings.base.model)
        require_safe(opened, settings.name, make_bucket=True)
        meta = PopulationMeta.find(opened, settings.name) or PopulationMeta.create(
            opened,
            Keyring(),
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
    def open(
        store: str | ObjectStore, settings: Settings | None = None, **fields: Any
    ) -> Population:
        """Open an existing population; `InvalidInput` if there is none."""
        settings = _settings(settings, fields)
        opened = open_store(store) if isinstance(store, str) else store
        meta = PopulationMeta.find(opened, check_name(settings.name))
        if meta is not None:
            require_safe(opened, settings.name)
        else:
            raise InvalidInput(
                f"no population {settings.name!r} in {opened.url}; create it with `populace run "
                "CONFIG` "
                "or Population.create"
            )
        return Population(settings, opened, meta)

    def enqueue(self, user: str, events: Iterable[LogEvent]) -> int:
        """Make a user's events durable, in order; returns their number. See `Producer.enqueue`."""
        return self.producer.enqueue(user, events)

    def enqueue_many(self, pairs: Iterable[tuple[str, Iterable[LogEvent]]]) -> int:
        """`enqueue` for many users at once; their events share segments."""
        return self.producer.enqueue_many(pairs)

    async def enqueue_async(self, user: str, events: Iterable[LogEvent]) -> int:
        """`enqueue` for asyncio."""
        return await self.producer.enqueue_async(user, events)

    async def enqueue_many_async(self, pairs: Iterable[tuple[str, Iterable[LogEvent]]]) -> int:
        """`enqueue_many` for asyncio."""
        return await self.producer.enqueue_many_async(pairs)

    def status(self) -> PopulationStatus:
        self.ledger.refresh()
        catalog, pending = self.ledger.catalog, self.ledger.pending
        decisions = catalog.count_decisions()
        return PopulationStatus(
            name=self.meta.name,
            base=self.meta.base,
            users=len({*pending.pseudonyms(), *(adapter.pseudonym for adapter in catalog)}),
            adapters=len(catalog),
            revisions=catalog.revisions.size,
            promoted=decisions["promote"],
            rejected=decisions["reject"],
            pending_events=pending.num_pending(),
            oldest_wait_s=round(pending.oldest_wait_s(), 1),
            heldout_tasks=pending.num_heldout(),
            settled_events=catalog.num_settled.total(),
            forgotten=len(catalog.forgotten()),
            running=any(catalog.owned.values()),
        )

    def users(self) -> list[str]:
        """Users who have sent anything."""
        self.ledger.refresh()
        return sorted(self.ledger.users().values())

    def revisions(self, user: str) -> list[RevisionInfo]:
        """A user's revisions from 0 on."""
        self.ledger.follow()
        adapter = self.ledger.adapter(user)
        notes = self.ledger.catalog.notes_of(adapter.pseudonym)
        first = RevisionInfo(
            revision=0,
            parent=None,
            is_tip=adapter.tip == 0,
            is_serving=adapter.serving == 0,
            is_kept=True,
            committed_at=None,
            num_events=0,
            metrics={},
            verdicts=_verdicts(notes, 0),
        )
        return [
            first,
            *(
                self._info(adapter, state, notes)
                for state in self.ledger.catalog.revisions_of(adapter.pseudonym)
            ),
        ]

    def manifest(self, user: str, revision: int) -> dict[str, Any]:
        """The payload of the record that committed a revision."""
        self.ledger.follow()
        adapter = self.ledger.adapter(user)
        if type(revision) is not int or not adapter.exists(revision):
            self.ledger.catalog.loadable(adapter, revision)
        if revision == 0:
            raise InvalidInput(
                "revision 0 has no manifest: it is the initialisation from the adapter's seed"
            )
        sealed = self.ledger.readers[adapter.partition].log.read(
            self.ledger.catalog.revision_of(adapter.pseudonym, revision).seq
        )
        assert sealed is not None
        return payload_of(sealed)

    def verify(self, user: str) -> Findings:
        """Walk the history that `user` is part of from its first record, and read every blob of the
        user's revisions. `Findings.problems` is empty when all is well. `populace verify --all`
        walks everybody's."""
        self.ledger.follow()
        adapter, findings = self.ledger.adapter(user), Findings()
        verify_partition(
            self.store,
            self.meta.name,
            adapter.partition,
            self.meta.root_key,
            findings,
            pseudonym=adapter.pseudonym,
        )
        return findings

    def rollback(self, user: str, to: int) -> bool:
        """Move a user's tip and serving to revision `to`. A running controller obeys between two
        waves; with none alive, this claims the population, does it, and releases it. Returns
        whether it is done already."""
        self.ledger.follow()
        self.ledger.catalog.loadable(self.ledger.adapter(check_user(user)), to)
        return self._command(user, Rollback(to=to))

    def pin(self, user: str, revision: int, pinned: bool = True) -> bool:
        """Keep a revision whatever the retention rule says; `pinned=False` takes it back. Obeyed
        like a rollback."""
        self.ledger.follow()
        self.ledger.catalog.loadable(self.ledger.adapter(check_user(user)), revision)
        return self._command(user, Pin(revision=revision, pinned=pinned))

    def forget(self, user: str) -> bool:
        """Make everything of a user unreadable for ever: their experience, their revisions, their
        name. Obeyed like a rollback; from then on whoever asks for the user gets `Forgotten`. The
        bytes go with the next repack."""
        self.ledger.follow()
        pseudonym = self.ledger.pseudonym(check_user(user))
        if self.ledger.catalog.is_forgotten(pseudonym):
            return True
        try:
            self.ledger.keys.fetch(pseudonym)
        except ObjectNotFound:
            raise InvalidInput(
                f"user {user!r} has never sent anything to population {self.meta.name!r}"
            ) from None
        return self._command(user, Forget())

    def repack(self, rule: RetentionRule) -> RepackReport:
        """Drop what the rule lets go and what is left of forgotten users. Needs the population to
        itself."""
        with self._claimed() as ledger:
            return ledger.repack(rule)

    def rotate_signing_key(self) -> PublicKey:
        """Hand over to a new signing key, in every partition by a record that the old one signs."""
        with self._claimed() as ledger:
            key = ledger.keyring.new_signing_key()
            for partition in range(self.meta.partitions):
                ledger.append(partition, Rotate(key=key.as_json()))
        return key

    def rotate_master_key(self) -> str:
        """Wrap the population's secrets and every user's key with a new master key; returns its
        name. When it was interrupted, do it again."""
        with self._claimed() as ledger:
            master = ledger.rewrap_keys()
        self.producer.secrets = ledger.secrets
        return master

    def parked(self, user: str | None = None) -> list[ParkedEvent]:
        """Events that were given up because they failed too often, of one user or of everybody,
        oldest first. For everybody it reads the whole history."""
        self.ledger.follow()
        if user is None:
            every = (
                parked_events(self.store, self.meta, partition) for partition in self.ledger.readers
            )
            pairs = [pair for found in every for pair in found]
        else:
            adapter = self.ledger.catalog.get(self.ledger.pseudonym(check_user(user)))
            pairs = [] if adapter is None else self._parked_of(adapter)
        found = []
        for pseudonym, item in pairs:
            with contextlib.suppress(Forgotten):
                found.append(self.parked_event(pseudonym, item))
        return found

    def parked_event(self, pseudonym: str, item: SettledEvent) -> ParkedEvent:
        """What a record says of an event that was parked, with what only the user's key opens."""
        detail, user = (
            self.ledger.seals.detail(pseudonym, item),
            self.ledger.keys.get(pseudonym).user,
        )
        return ParkedEvent(
            user=user, position=item.event.position, reason=item.reason, detail=detail
        )

    def _parked_of(self, adapter: AdapterState) -> list[tuple[str, SettledEvent]]:
        records = (
            self.ledger.readers[adapter.partition].read_at(seq)[1]
            for seq in settling_records(self.ledger.catalog, adapter)
        )
        return [
            pair for record in records for pair in parked_in(record) if pair[0] == adapter.pseudonym
        ]

    @contextlib.contextmanager
    def _claimed(self, user: str | None = None) -> Iterator[Ledger]:
        """The population's only owner, or that of one user's partition."""
        ledger = Ledger(self.store, self.meta)
        partitions = None if user is None else [partition_of(user, self.meta.partitions)]
        ledger.claim(self.settings.run.takeover_s, partitions)
        try:
            ledger.read_experience()
            yield ledger
        finally:
            ledger.release()
            self.ledger.refresh()

    def _command(self, user: str, command: Command) -> bool:
        """Put a command into the user's stream; with no controller alive, obey it here."""
        self.ledger.enqueue({user: [command]})
        try:
            with self._claimed(user) as ledger:
                done = ledger.obey_commands()
        except OwnerAlive:
            return False
        tag = self.ledger.seals.tag(self.ledger.pseudonym(user), str(command.event_id))
        for record in done:
            if (
                isinstance(record, Verdict)
                and record.command == tag
                and record.decision == "refused"
            ):
                raise InvalidInput(f"refused: {record.reason}")
        return any(record.command == tag for record in done)

    def _info(
        self, adapter: AdapterState, state: RevisionState, notes: Sequence[Note]
    ) -> RevisionInfo:
        header, wave = self.ledger.commit_of(adapter, state.revision)
        return RevisionInfo(
            revision=state.revision,
            parent=state.parent,
            is_tip=state.revision == adapter.tip,
            is_serving=state.revision == adapter.serving,
            is_kept=state.is_kept,
            committed_at=header.written_at or None,
            num_events=state.num_trained,
            metrics=wave.entry(adapter.pseudonym, state.revision).metrics,
            verdicts=_verdicts(notes, state.revision),
        )

    def sample(
        self,
        user: str,
        messages: str | Messages,
        revision: int | str = "serving",
        rollout: RolloutSettings | None = None,
    ) -> str:
        """An answer of a user's adapter: `serving`, `tip`, or a revision number. A user without an
        adapter gets the base's answer."""
        self.ledger.follow()
        check_user(user)
        check_prompt("sample", messages)
        rollout = rollout or self.settings.rollout
        engine, chat = self._local_engine()
        ref = self._ref(user, revision)
        try:
            engine.page_in([ref], False)
        except ObjectNotFound:  # its pack was just rewritten
            self.ledger.follow()
            engine.page_in([ref := self._ref(user, revision)], False)
        request = RolloutRequest(
            adapter=ref.key,
            event_id="sample",
            prompt_ids=chat.prompt_ids(messages),
            num_samples=1,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
        )
        (group,) = engine.roll_out([request])
        return chat.text(group.samples[0].completion_ids)

    def _ref(self, user: str, revision: int | str) -> AdapterRef:
        pseudonym = self.ledger.pseudonym(user)
        if pseudonym in self.ledger.catalog:
            adapter = self.ledger.adapter(user)
            return self.ledger.ref(adapter, revision_number(self.ledger.catalog, adapter, revision))
        spec = AdapterSpec.from_dict(asdict(self.settings.adapter))
        if revision not in (0, "0", "serving", "tip"):
            raise InvalidInput(
                f"revision is {revision!r}; user {user!r} has no adapter yet, only revision 0"
            )
        return AdapterRef(
            key=AdapterKey(pseudonym, 0), spec=spec, seed=self.meta.adapter_seed(user)
        )

    def base(self) -> PreparedBase:
        """The base of this population, checked against its digest."""
        base = find_base(self.settings.base.model)
        verify_digest(self.meta, base.digest)
        return base

    def shard_settings(self, base: PreparedBase, chat: Chat) -> ShardSettings:
        """How the workers of this population start."""
        return ShardSettings(
            base_folder=base.folder,
            dtype=self.settings.base.dtype,
            store_url=self.store.url,
            population=self.meta.name,
            slots=self.settings.scheduler.slots,
            residency=ResidencyBudget(
                warm_bytes=int(self.settings.residency.warm_mb * 1e6),
                near_bytes=int(self.settings.residency.near_mb * 1e6),
                near_folder=self.settings.residency.near_folder,
            ),
            threads=self.settings.run.threads,
            eos_ids=chat.eos_ids,
            trainer=TrainerSettings.of(self.settings.train, self.settings.optimizer),
        )

    def new_engine(self, *, dtype: str, backend: str) -> ShardEngine:
        """An engine in this process that computes in `dtype` on `backend`."""
        base = self.base()
        settings = self.shard_settings(base, Chat(base.folder))
        kernels = dataclasses.replace(
            settings.trainer.kernels, backend=backend, row_multiple=ROW_MULTIPLE["invariant"]
        )
        trainer = dataclasses.replace(settings.trainer, kernels=kernels)
        return ShardEngine(
            dataclasses.replace(settings, dtype=dtype, slots=2, trainer=trainer), self.store
        )

    def _local_engine(self) -> tuple[ShardEngine, Chat]:
        base = self.base()
        chat = Chat(base.folder)
        if self._engine is None:
            self._engine = ShardEngine(self.shard_settings(base, chat), self.store)
        return self._engine, chat


def reading_of(settings: Settings) -> Reading:
    """How a process with these settings looks at experience."""
    return Reading(
        cache_bytes=int(settings.stream.cache_mb * 1e6),
        price=functools.partial(estimate_tokens, rollout=settings.rollout),
        events_per_update=settings.scheduler.events_per_update,
        rank=settings.adapter.rank,
        user_ranks=settings.user_ranks,
        tenants=tuple(settings.scheduler.tenants),
    )


def _settings(settings: Settings | None, fields: Mapping[str, Any]) -> Settings:
    unknown = set(fields) - set(Settings.__dataclass_fields__)
    if unknown:
        raise InvalidInput(
            f"unknown settings {sorted(unknown)}; see docs/reference/configuration.md for all of "
            "them"
        )
    settings = dataclasses.replace(settings or Settings(), **fields)
    if found := problems(settings):
        raise InvalidInput("; ".join(found))
    return settings
