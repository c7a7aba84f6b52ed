"""A population's durable state seen from one process: its identity, its logs, and the catalog derived from them.

Reading needs no permission. Writing a partition's revision log needs `claim`, and the log itself fences whoever
claimed before.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from populace.population.experience import Forget, LogEvent, Pin, Rollback
from populace.population.meta import PopulationMeta
from populace.population.stream import ExperienceLog, LoggedEvent, PendingIndex, Row, Seals, partition_of
from populace.storage.catalog import Catalog
from populace.storage.checkpoint import restore, write_checkpoint
from populace.storage.commit import Owner, RevisionLogReader
from populace.storage.errors import Fenced, Forgotten, InvalidInput, ObjectNotFound, OwnerAlive
from populace.storage.keys import Keyring, Secrets, UserKeys
from populace.storage.objects import ObjectStore
from populace.storage.records import Batch, Record, RecordHeader, RevisionEntry, Tombstone, Verdict, WaveManifest
from populace.storage.repack import RepackReport, RetentionRule, repack
from populace.storage.states import AdapterState

logger = logging.getLogger(__name__)
HEARTBEAT_S = 1.0
ROWS_PER_SEGMENT = 4096


class Ledger:
    """Logs, keys and catalog of one population."""

    def __init__(self, store: ObjectStore, meta: PopulationMeta, keyring: Keyring | None = None) -> None:
        self.store, self.meta = store, meta
        self.keyring = keyring or Keyring()
        self.secrets = Secrets.read(store, meta.name, self.keyring)
        self.keys = UserKeys(store, meta.name, self.keyring)
        self.seals = Seals(self.keys, bytes.fromhex(self.secrets.pseudonym_key))
        self.catalog = Catalog(self.mask_seed)
        self.pending = PendingIndex(meta.heldout_key(), meta.heldout_share)
        self.experience = {p: ExperienceLog(store, meta.name, p) for p in range(meta.partitions)}
        self.readers = {p: RevisionLogReader(store, meta.name, p, meta.root_key) for p in range(meta.partitions)}
        self._owners: dict[int, Owner] = {}
        self._checkpointed: dict[int, int] = {}
        self._heartbeat: _Heartbeat | None = None
        for partition, reader in self.readers.items():
            if (seq := restore(reader, self.catalog)) is not None:
                self._checkpointed[partition] = seq
        self.refresh()

    def pseudonym(self, user: str) -> str:
        """The name under which `user` stands in the logs: 128 bits of a keyed hash, hex."""
        key = bytes.fromhex(self.secrets.pseudonym_key)
        return hmac.new(key, user.encode(), hashlib.sha256).hexdigest()[:32]

    def mask_seed(self, pseudonym: str, seed: int) -> int:
        """Hides a seed in the log, and brings it back: seeds follow from user ids, and nobody without the secrets may
        test a guess at who somebody is."""
        key = bytes.fromhex(self.secrets.pseudonym_key)
        digest = hmac.new(key, f"seed/{pseudonym}".encode(), hashlib.sha256).digest()
        return seed ^ (int.from_bytes(digest[:8], "big") >> 1)

    def _master(self) -> str:
        """The master key that wraps new keys, as the store has it now: another process may have rotated it."""
        self.secrets = Secrets.read(self.store, self.meta.name, self.keyring)
        return self.secrets.master

    def refresh(self) -> None:
        """Read what the logs have gained. Partitions that this process owns have nothing new from others."""
        for partition, reader in self.readers.items():
            if partition not in self._owners:
                for header, record in reader.read_new():
                    self._apply(header, record)
        self.read_experience()

    def read_experience(self) -> int:
        """Take in newly enqueued events; returns how many."""
        num_events = sum(
            self.pending.observe(log, partition, self.catalog, self.seals) for partition, log in self.experience.items()
        )
        self.pending.trim(self.catalog)
        return num_events

    def enqueue(self, events: Mapping[str, Sequence[LogEvent]]) -> None:
        """Make users' events durable, user -> events in order. `Forgotten` if one of the users was, before anything
        is written; to who raced with the forgetting, after it: then what was written can't be read by anybody."""
        pseudonyms = {user: self.pseudonym(user) for user in events}
        with ThreadPoolExecutor(16, thread_name_prefix="populace-keys") as pool:
            made = [
                pool.submit(self.keys.ensure, pseudonym, user, self._master) for user, pseudonym in pseudonyms.items()
            ]
            for future in made:
                future.result()
            by_partition: dict[int, list[Row]] = {}
            for user, own in events.items():
                rows = by_partition.setdefault(partition_of(user, self.meta.partitions), [])
                rows += [self.seals.seal(pseudonyms[user], event) for event in own]
            for partition, rows in sorted(by_partition.items()):
                for start in range(0, len(rows), ROWS_PER_SEGMENT):
                    self.experience[partition].append(rows[start : start + ROWS_PER_SEGMENT])
            for future in [pool.submit(self.keys.fetch, pseudonym) for pseudonym in pseudonyms.values()]:
                future.result()

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
        seen = {partition: reader.next_seq for partition, reader in self.readers.items()}
        self.refresh()
        if any(reader.next_seq != seen[partition] for partition, reader in self.readers.items()):
            raise OwnerAlive(f"population {self.meta.name!r} was written by another process just now; start again")
        name = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
        try:
            for partition, reader in self.readers.items():
                self._owners[partition] = Owner(reader, name, self.keyring)
                self.catalog.owned[partition] = True
            self._heartbeat = _Heartbeat(self, name, interval_s=min(HEARTBEAT_S, takeover_s / 4))
            self._heartbeat.start()
            self._finish_forgetting()
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
            self.catalog.owned[partition] = False
            if not owner.is_lost:
                with contextlib.suppress(Fenced):  # then it isn't ours to release; the others are
                    owner.release()

    def owner(self, partition: int) -> Owner:
        return self._owners[partition]

    def append_all(self, records: Sequence[tuple[int, Record]]) -> None:
        """Commit (partition, record) pairs, one atomic batch per partition, and apply them."""
        by_partition: dict[int, list[Record]] = {}
        for partition, record in records:
            by_partition.setdefault(partition, []).append(record)
        for partition, own in by_partition.items():
            self.append(partition, own[0] if len(own) == 1 else Batch(records=own))

    def append(self, partition: int, record: Record) -> None:
        """Commit `record` and apply it to the catalog."""
        self._apply(self._owners[partition].append(record), record)

    def rewrap_keys(self) -> str:
        """Make a master key and wrap everything with it. The secrets first, so that new users' keys get it too."""
        new = replace(self.secrets, master=self.keyring.new_master_key())
        self.store.put(Secrets.path(self.meta.name), new.wrap(self.meta.name, self.keyring))
        self.secrets = new
        for pseudonym in self.keys.pseudonyms():
            self.keys.rewrap(pseudonym, new.master)
        # A takeover meanwhile may have forgotten somebody whose key was just written again.
        for reader in self.readers.values():
            for header, record in reader.read_new():
                self._apply(header, record)
        self._finish_forgetting()
        return new.master

    def _apply(self, header: RecordHeader, record: Record) -> None:
        self.catalog.apply(header, record)
        if isinstance(record, Tombstone):
            self.pending.forget(record.pseudonym)
            self.keys.drop([record.pseudonym])

    def checkpoint(self, every_records: int) -> None:
        """Save the catalog of owned partitions whose log has grown by that many records since the last time."""
        for partition, owner in self._owners.items():
            if owner.reader.next_seq - self._checkpointed.get(partition, -1) > every_records:
                seq = write_checkpoint(owner, self.catalog)
                if seq is not None:
                    self._checkpointed[partition] = seq

    def repack(self, rule: RetentionRule) -> RepackReport:
        """Drop what the rule lets go, in every owned partition."""
        report = RepackReport()
        for owner in self._owners.values():
            report += repack(owner, self.catalog, rule)
        return report

    def adapter(self, user: str) -> AdapterState:
        """The adapter of `user`; `InvalidInput` if there is none yet, `Forgotten` if there is none any more."""
        pseudonym = self.pseudonym(user)
        found = self.catalog.get(pseudonym)
        if found is not None:
            return found
        if self.catalog.is_forgotten(pseudonym):
            raise Forgotten(f"user {user!r} was forgotten; nothing of theirs can be read or written again")
        raise InvalidInput(
            f"user {user!r} has no adapter in population {self.meta.name!r} yet; adapters are created when a "
            "run first learns from a user's experience"
        )

    def wave(self, adapter: AdapterState, revision: int) -> WaveManifest:
        """The record that committed a revision above 0; read from the log."""
        _, wave = self.readers[adapter.partition].read_at(adapter.revision(revision).seq)
        assert isinstance(wave, WaveManifest)
        return wave

    def entry(self, adapter: AdapterState, revision: int) -> RevisionEntry:
        """All that the wave record says of a revision above 0."""
        return self.wave(adapter, revision).entry(adapter.pseudonym, revision)

    def obey_commands(self) -> list[Verdict | Tombstone]:
        """Execute the commands that users' logs hold, in order, each once. Needs the claim."""
        done: list[Verdict | Tombstone] = []
        for logged in list(self.pending.commands):
            if isinstance(logged.event, Forget):
                done.append(self._forget(logged))
            elif (adapter := self.catalog.get(logged.pseudonym)) is not None:
                verdict = _answer(adapter, logged)
                self.append(adapter.partition, verdict)
                done.append(verdict)
        self.pending.trim(self.catalog)
        return done

    def _finish_forgetting(self) -> None:
        """A controller may have died between a tombstone and the end of the key."""
        for pseudonym in self.catalog.forgotten():
            if not self.keys.is_forgotten(pseudonym):
                self._erase(pseudonym)

    def _forget(self, logged: LoggedEvent) -> Tombstone:
        """The tombstone first, then the key: a crash in between is finished by the next claim."""
        tombstone = Tombstone(pseudonym=logged.pseudonym, command=logged.ref.tag)
        self.append(partition_of(logged.user, self.meta.partitions), tombstone)
        self._erase(logged.pseudonym)
        return tombstone

    def _erase(self, pseudonym: str) -> None:
        """Exports first: the marker over the key says that all of it is done."""
        for key in list(self.store.list(exports_folder(self.meta.name, pseudonym))):
            self.store.delete(key)
        self.keys.forget(pseudonym)

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


def _answer(adapter: AdapterState, logged: LoggedEvent) -> Verdict:
    """The record that answers a command about a revision; what can't be done changes nothing and says why."""
    event, reason, tip, serving = logged.event, "", adapter.tip, adapter.serving
    assert isinstance(event, (Rollback, Pin))
    target = event.to if isinstance(event, Rollback) else event.revision
    try:
        adapter.require(target)
    except InvalidInput as error:
        decision, reason = "refused", str(error)
    else:
        match event:
            case Rollback():
                decision, reason, tip, serving = "rollback", f"asked for revision {target}", target, target
            case Pin(pinned=True):
                decision, reason = "pin", "to be kept whatever the retention rule says"
            case _:
                decision, reason = "unpin", "under the retention rule again"
    return Verdict(
        pseudonym=adapter.pseudonym,
        decision=decision,
        judged=target,
        tip=tip,
        serving=serving,
        reason=reason,
        command=logged.ref.tag,
    )


def exports_folder(population: str, pseudonym: str) -> str:
    """Where a user's shared exports lie."""
    return f"{population}/exports/{pseudonym}"


def _owner_key(population: str, partition: int) -> str:
    return f"{population}/owners/{partition}.json"
