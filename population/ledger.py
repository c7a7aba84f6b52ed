"""A population's durable state seen from one process: its identity, its logs, and the catalog derived from them.

Reading needs no permission. Writing a partition's revision log needs `claim`, and the log itself fences whoever
claimed before.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass

from populace.population.experience import Rollback
from populace.population.stream import ExperienceLog, LoggedEvent, PendingIndex
from populace.storage.catalog import AdapterState, Catalog
from populace.storage.commit import Owner, RevisionLogReader
from populace.storage.errors import AlreadyExists, Damaged, InvalidInput, ObjectNotFound, OwnerAlive
from populace.storage.manifest import Record, Verdict
from populace.storage.objects import ObjectStore

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
HEARTBEAT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PopulationMeta:
    """`population.json`: written once, when the population is created."""

    format: int
    name: str
    base: str
    base_digest: str
    partitions: int
    seed: int
    heldout_share: float
    pseudonym_key: str
    """Hex; keys the pseudonyms under which users stand in the revision logs."""

    @staticmethod
    def create(
        store: ObjectStore,
        *,
        name: str,
        base: str,
        base_digest: str,
        partitions: int,
        seed: int,
        heldout_share: float,
    ) -> PopulationMeta:
        """Write a new population; of two at once, one wins and both use it."""
        meta = PopulationMeta(
            format=FORMAT_VERSION,
            name=name,
            base=base,
            base_digest=base_digest,
            partitions=partitions,
            seed=seed,
            heldout_share=heldout_share,
            pseudonym_key=secrets.token_hex(32),
        )
        try:
            store.create(f"{name}/population.json", json.dumps(asdict(meta), indent=1).encode())
        except AlreadyExists:
            return PopulationMeta.read(store, name)
        return meta

    @staticmethod
    def read(store: ObjectStore, name: str) -> PopulationMeta:
        body = json.loads(store.get(f"{name}/population.json"))
        if body.get("format") != FORMAT_VERSION:
            raise InvalidInput(
                f"population {name!r} has format {body.get('format')}; this version reads {FORMAT_VERSION}"
            )
        return PopulationMeta(**body)

    @staticmethod
    def find(store: ObjectStore, name: str) -> PopulationMeta | None:
        try:
            return PopulationMeta.read(store, name)
        except ObjectNotFound:
            return None

    def pseudonym(self, user: str) -> str:
        """The name under which `user` stands in the revision logs: 128 bits of a keyed hash, hex."""
        key = bytes.fromhex(self.pseudonym_key)
        return hmac.new(key, user.encode(), hashlib.sha256).hexdigest()[:32]

    def heldout_key(self) -> bytes:
        """Fixed by name and seed, so that a population made again holds out the same tasks."""
        return hashlib.blake2b(f"heldout/{self.name}/{self.seed}".encode(), digest_size=32).digest()

    def adapter_seed(self, user: str) -> int:
        """63 bits; the seed of a user's initialisation and noise."""
        digest = hashlib.blake2b(f"{self.seed}/{user}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


class Ledger:
    """Logs and catalog of one population."""

    def __init__(self, store: ObjectStore, meta: PopulationMeta) -> None:
        self.store, self.meta = store, meta
        self.catalog = Catalog()
        self.pending = PendingIndex(meta.heldout_key(), meta.heldout_share)
        self.experience = {p: ExperienceLog(store, meta.name, p) for p in range(meta.partitions)}
        self._readers = {p: RevisionLogReader(store, meta.name, p) for p in range(meta.partitions)}
        self._owners: dict[int, Owner] = {}
        self._heartbeat: _Heartbeat | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read what the logs have gained. Partitions that this process owns have nothing new from others."""
        for partition, reader in self._readers.items():
            if partition not in self._owners:
                for header, record in reader.read_new():
                    self.catalog.apply(header, record)
        self.read_experience()

    def read_experience(self) -> int:
        """Take in newly enqueued events; returns how many."""
        num_events = sum(
            self.pending.observe(log, partition, self.catalog, self.meta.pseudonym)
            for partition, log in self.experience.items()
        )
        self.pending.trim(self.catalog)
        return num_events

    def claim(self, takeover_s: float) -> None:
        """Own every partition. Raises `OwnerAlive` when another controller shows life within `takeover_s`."""
        held = [partition for partition, owned in self.catalog.owned.items() if owned]
        before = {partition: self._life(partition) for partition in held}
        if held:
            time.sleep(takeover_s)
        for partition in held:
            if self._life(partition) != before[partition]:
                raise OwnerAlive(
                    f"population {self.meta.name!r} is being run by another process ({before[partition]}); "
                    "stop that one first, or wait for it"
                )
        seen = {partition: reader.next_seq for partition, reader in self._readers.items()}
        self.refresh()
        if any(reader.next_seq != seen[partition] for partition, reader in self._readers.items()):
            raise OwnerAlive(f"population {self.meta.name!r} was written by another process just now; start again")
        name = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
        try:
            for partition, reader in self._readers.items():
                self._owners[partition] = Owner(reader, name)
                self.catalog.owned[partition] = True
            self._heartbeat = _Heartbeat(self, name, interval_s=min(HEARTBEAT_S, takeover_s / 4))
            self._heartbeat.start()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give every partition back; a no-op without a claim."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        while self._owners:
            partition, owner = self._owners.popitem()
            if not owner.is_lost:
                owner.release()
            self.catalog.owned[partition] = False

    def owner(self, partition: int) -> Owner:
        return self._owners[partition]

    def append(self, partition: int, record: Record) -> None:
        """Commit `record` and apply it to the catalog."""
        header = self._owners[partition].append(record)
        self.catalog.apply(header, record)

    def adapter(self, user: str) -> AdapterState:
        """The adapter of `user`; `InvalidInput` if there is none yet."""
        found = self.catalog.get(self.meta.pseudonym(user))
        if found is None:
            raise InvalidInput(
                f"user {user!r} has no adapter in population {self.meta.name!r} yet; adapters are created when a "
                "run first learns from a user's experience"
            )
        return found

    def obey_commands(self) -> list[Verdict]:
        """Execute the commands that users' logs hold, in order, each once. Needs the claim."""
        done = []
        for pseudonym, logged in list(self.pending.commands):
            adapter = self.catalog.get(pseudonym)
            if adapter is None:
                continue
            verdict = _rollback_verdict(adapter, logged)
            self.append(adapter.partition, verdict)
            done.append(verdict)
        self.pending.trim(self.catalog)
        return done

    def users(self) -> dict[str, str]:
        """Pseudonym -> user id, for every user with experience."""
        return {queue.pseudonym: queue.user for queue in self.pending.queues.values()}

    def _life(self, partition: int) -> str:
        try:
            return self.store.get(_owner_key(self.meta.name, partition)).decode()
        except ObjectNotFound:
            return ""


class _Heartbeat(threading.Thread):
    """Shows life while partitions are owned. Nobody's right to write depends on it."""

    def __init__(self, ledger: Ledger, name: str, interval_s: float) -> None:
        super().__init__(daemon=True, name="populace-heartbeat")
        self._keys = [_owner_key(ledger.meta.name, p) for p in range(ledger.meta.partitions)]
        self._store, self._name = ledger.store, name
        self._interval_s = interval_s
        self._stopped = threading.Event()

    def run(self) -> None:
        counter = 0
        while True:
            try:
                for key in self._keys:
                    self._store.put(key, json.dumps({"owner": self._name, "counter": counter}).encode())
            except Exception as error:  # a store that is away for a moment must not end the heartbeat
                logger.warning("heartbeat of %s failed: %s", self._name, error)
            counter += 1
            if self._stopped.wait(self._interval_s):
                return

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def _rollback_verdict(adapter: AdapterState, logged: LoggedEvent) -> Verdict:
    """The record that answers a rollback; a target that doesn't exist changes nothing and says so."""
    event = logged.event
    assert isinstance(event, Rollback)
    exists = event.to == 0 or event.to in adapter.revisions
    return Verdict(
        pseudonym=adapter.pseudonym,
        decision="rollback" if exists else "refused",
        judged=event.to,
        tip=event.to if exists else adapter.tip,
        serving=event.to if exists else adapter.serving,
        reason=f"asked for revision {event.to}" if exists else f"revision {event.to} does not exist",
        command=event.event_id,
    )


def _owner_key(population: str, partition: int) -> str:
    return f"{population}/owners/{partition}.json"


def check_name(name: str) -> str:
    """A population's name is a folder name in the store."""
    if not name or not all(char.isalnum() or char in "-_." for char in name) or name.startswith("."):
        raise InvalidInput(f"population name is {name!r}; use letters, digits, '-', '_' and '.'")
    return name


def verify_digest(meta: PopulationMeta, digest: str) -> None:
    if meta.base_digest != digest:
        raise Damaged(
            f"population {meta.name!r} lives on base {meta.base} with digest {meta.base_digest[:16]}…, but the base "
            f"given has {digest[:16]}…; name the base that the population was created on"
        )
