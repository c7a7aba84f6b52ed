"""`Population`: the public Python API.

    population = Population.create("build/store", name="demo", base="smollm2-moe", rewards={...})
    population.enqueue("ada", [Task(prompt="What is rain?", reward="short")])

Enqueueing needs no running trainer; `populace run` (or `run.run_population`) is what trains. What
is slow to import is imported by the method that needs it: the ledger by those that read, torch by
`sample`, Ray by none.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from populace.configs.checks import problems
from populace.configs.schema import BaseSettings, RolloutSettings, Settings
from populace.population.experience.checks import CheckedEvent, check_prompt, check_user
from populace.population.experience.contract import Checked, Enqueues
from populace.population.experience.events import Command, Forget, Messages, Pin, Rollback
from populace.storage.errors import InvalidInput, ObjectNotFound, OwnerAlive
from populace.storage.identity import PopulationMeta, check_name, verify_digest
from populace.storage.keys.keyring import Keyring, PublicKey
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.open import open_store

if TYPE_CHECKING:
    from populace.population.ledger.ledger import Ledger
    from populace.population.ledger.ownership import Ownership
    from populace.population.ledger.queries import ParkedEvent, PopulationStatus, RevisionInfo
    from populace.population.sampler import Sampler
    from populace.storage.catalog.repack import RepackReport, RetentionRule
    from populace.storage.log.verify import Findings


class Population(Enqueues):
    """A population in a store. Nothing here writes a revision log without saying so."""

    def __init__(self, settings: Settings, store: ObjectStore, meta: PopulationMeta) -> None:
        """`InvalidInput` where the population's master key isn't."""
        from populace.population.experience.producer import Producer

        self.settings, self.store, self.meta = settings, store, meta
        self.rewards = settings.rewards.functions
        self.producer = Producer(store, meta, rewards=self.rewards, settings=settings.stream)

    @functools.cached_property
    def ledger(self) -> Ledger:
        """Logs and catalog; who only enqueues needs neither."""
        from populace.population.ledger.ledger import Ledger

        return Ledger(self.store, self.meta, self.producer.seals, self.settings)

    @functools.cached_property
    def ownership(self) -> Ownership:
        """The partitions that this process writes: none, unless it runs a controller."""
        from populace.population.ledger.ownership import Ownership

        return Ownership(self.ledger)

    @staticmethod
    def create(
        store: str | ObjectStore, settings: Settings | None = None, **fields: Any
    ) -> Population:
        """Make a population, or open it when it is there. `fields` are fields of `Settings`, e.g.
        `name=`."""
        from populace.storage.objects.probe import require_safe
        from populace.workers.base.families import is_random
        from populace.workers.base.registry import find_base, find_prepared

        settings = _settings(settings, fields)
        check_name(settings.name)
        opened = open_store(store) if isinstance(store, str) else store
        base = find_base(settings.base.model)
        if is_random(base.folder):
            check_scratch(settings.base, opened.url)
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
        from populace.storage.objects.probe import require_safe

        settings = _settings(settings, fields)
        opened = open_store(store) if isinstance(store, str) else store
        meta = PopulationMeta.find(opened, check_name(settings.name))
        if meta is None:
            raise InvalidInput(
                f"no population {settings.name!r} in {opened.url}; create it with `populace run "
                "CONFIG` or Population.create"
            )
        require_safe(opened, settings.name)
        return Population(settings, opened, meta)

    # Experience in.

    def send(self, events: Checked) -> int:
        return self.producer.send(events)

    async def send_async(self, events: Checked) -> int:
        return await self.producer.send_async(events)

    # What there is.

    def status(self) -> PopulationStatus:
        """Counts over the whole population."""
        from populace.population.ledger.queries import status_of

        self.ledger.refresh()
        return status_of(self.ledger)

    def users(self) -> list[str]:
        """Users who have sent anything."""
        self.ledger.refresh()
        return sorted(self.ledger.users().values())

    def revisions(self, user: str) -> list[RevisionInfo]:
        """A user's revisions from 0 on."""
        from populace.population.ledger.queries import revision_infos

        self.ledger.follow()
        return revision_infos(self.ledger, self.ledger.adapter(user))

    def manifest(self, user: str, revision: int) -> dict[str, Any]:
        """The payload of the record that committed a revision."""
        from populace.population.ledger.queries import manifest_of

        self.ledger.follow()
        return manifest_of(self.ledger, self.ledger.adapter(user), revision)

    def parked(self, user: str | None = None) -> list[ParkedEvent]:
        """Events that were given up because they failed too often, of one user or of everybody,
        oldest first. For everybody it reads the whole history."""
        from populace.population.ledger.queries import parked_of, parked_of_all

        self.ledger.follow()
        if user is None:
            return parked_of_all(self.ledger)
        adapter = self.ledger.catalog.get(self.ledger.pseudonym(check_user(user)))
        return [] if adapter is None else parked_of(self.ledger, adapter)

    def verify(self, user: str) -> Findings:
        """Walk the history that `user` is part of from its first record, and read every blob of the
        user's revisions. `Findings.problems` is empty when all is well. `populace verify --all`
        walks everybody's."""
        from populace.storage.log.verify import Findings, verify_partition

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

    # Answers.

    def sample(
        self,
        user: str,
        messages: str | Messages,
        revision: int | str = "serving",
        rollout: RolloutSettings | None = None,
    ) -> str:
        """An answer of a user's adapter: `serving`, `tip`, or a revision number. A user without an
        adapter gets the base's answer. Loads the base into this process."""
        self.ledger.follow()
        check_user(user)
        check_prompt("sample", messages)
        return self._sampler.sample(user, messages, revision, rollout or self.settings.rollout)

    @functools.cached_property
    def _sampler(self) -> Sampler:
        from populace.population.sampler import Sampler  # torch takes seconds to import

        return Sampler(self.settings, self.ledger)

    # Commands.

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
        """Drop what the rule lets go and what is left of erased users. Needs the population to
        itself."""
        from populace.population.ledger.upkeep import Upkeep

        with self._claimed() as ledger:
            return Upkeep(ledger).repack(rule)

    def rotate_signing_key(self) -> PublicKey:
        """Hand over to a new signing key, in every partition by a record that the old one signs."""
        from populace.storage.log.records import Rotate

        with self._claimed() as ledger:
            key = ledger.keys.keyring.new_signing_key()
            for partition in range(self.meta.partitions):
                ledger.append(partition, Rotate(key=key.as_json()))
        return key

    def rotate_master_key(self) -> str:
        """Wrap the population's secrets and every user's key with a new master key; returns its
        name. When it was interrupted, do it again."""
        from populace.population.ledger.upkeep import rewrap_keys

        with self._claimed() as ledger:
            return rewrap_keys(ledger)

    @contextlib.contextmanager
    def _claimed(self, user: str | None = None) -> Iterator[Ledger]:
        """The population's only owner, or that of one user's partition."""
        from populace.population.experience.segments import partition_of
        from populace.population.ledger.ledger import Ledger
        from populace.population.ledger.ownership import Ownership

        ledger = Ledger(self.store, self.meta, self.producer.seals)
        ownership = Ownership(ledger)
        partitions = None if user is None else [partition_of(user, self.meta.partitions)]
        ownership.claim(self.settings.run.takeover_s, partitions)
        try:
            ledger.read_experience()
            yield ledger
        finally:
            ownership.release()
            self.ledger.refresh()

    def _command(self, user: str, command: Command) -> bool:
        """Put a command into the user's stream; with no controller alive, obey it here."""
        from populace.population.ledger.commands import obey_commands
        from populace.storage.log.records import Decision, Verdict

        self.send({user: [CheckedEvent.of(command)]})
        try:
            with self._claimed(user) as ledger:
                done = obey_commands(ledger)
        except OwnerAlive:
            return False
        tag = self.ledger.seals.tag(self.ledger.pseudonym(user), str(command.event_id))
        answers = [record for record in done if record.command == tag]
        for record in answers:
            if isinstance(record, Verdict) and record.decision is Decision.REFUSED:
                raise InvalidInput(f"refused: {record.reason}")
        return bool(answers)


def check_scratch(base: BaseSettings, store: str) -> None:
    """`InvalidInput` if a population on a base of random weights is to be kept in `store`."""
    if not base.scratch and not store.startswith("memory://"):
        raise InvalidInput(
            f"base.model is {base.model!r}, whose weights are drawn anew by whatever computes, and "
            f"{store} keeps what is learned on them; use a checkpoint, or say base.scratch=true if "
            "the population is for measuring"
        )


def _settings(settings: Settings | None, fields: Mapping[str, Any]) -> Settings:
    unknown = set(fields) - set(Settings.__dataclass_fields__)
    if unknown:
        raise InvalidInput(
            f"unknown settings {sorted(unknown)}; see docs/reference/configuration.md for all of "
            "them"
        )
    settings = replace(settings or Settings(), **fields)
    if found := problems(settings):
        raise InvalidInput("; ".join(found))
    return settings
