"""A population's durable state seen from one process: its identity, its logs, and the catalog
derived from them.

Reading needs no permission. Writing a partition's revision log needs `claim`, and the log itself
fences whoever claimed before.
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
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from populace.population.experience.consumer import Consumer, Reading
from populace.population.experience.events import Forget, LogEvent
from populace.population.experience.pending import PendingIndex
from populace.population.experience.producer import Producer
from populace.population.experience.sealing import LoggedEvent
from populace.population.experience.segments import partition_of
from populace.population.experience.snapshot import SegmentCache
from populace.population.ledger.commands import _answer, exports_folder
from populace.population.ledger.heartbeat import (
    HEARTBEAT_S,
    Heartbeat,
    controller_key,
    owner_key,
    read_life,
    stop_key,
)
from populace.population.ledger.sharing import share_out
from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.checkpoint import restore, write_checkpoint
from populace.storage.catalog.repack import RepackReport, RetentionRule, repack
from populace.storage.catalog.states import AdapterState
from populace.storage.errors import (
    Fenced,
    Forgotten,
    InvalidInput,
    ObjectNotFound,
    OutcomeUnknown,
    OwnerAlive,
    PopulaceError,
)
from populace.storage.identity import PopulationMeta
from populace.storage.keys.keyring import Keyring
from populace.storage.keys.secrets import Secrets
from populace.storage.log.owner import Owner
from populace.storage.log.reader import RevisionLogReader
from populace.storage.log.records import (
    Batch,
    Claim,
    Compaction,
    Record,
    RecordHeader,
    RevisionEntry,
    Tombstone,
    Verdict,
    WaveManifest,
    parts_of,
)
from populace.storage.objects.contract import ObjectStore
from populace.workers.batch import AdapterRef, revision_ref

logger = logging.getLogger(__name__)


class Ledger:
    """Logs, keys and catalog of one population."""

    def __init__(
        self,
        store: ObjectStore,
        meta: PopulationMeta,
        keyring: Keyring | None = None,
        reading: Reading | None = None,
        producer: Producer | None = None,
    ) -> None:
        """Reads the revision logs; experience is read by `refresh` and `read_experience`."""
        reading = reading or Reading()
        self.store, self.meta = store, meta
        self.producer = producer or Producer(store, meta, keyring)
        self.keyring, self.keys, self.seals = (
            self.producer.keyring,
            self.producer.keys,
            self.producer.seals,
        )
        self.experience = self.producer.logs
        self.catalog = Catalog(self.mask_seed)
        self.pending = PendingIndex(reading.events_per_update)
        cache = SegmentCache(reading.cache_bytes)
        self.consumers = {
            p: Consumer(log, p, self.seals, self.pending, cache, meta, reading)
            for p, log in self.experience.items()
        }
        self.readers = {
            p: RevisionLogReader(store, meta.name, p, meta.root_key) for p in range(meta.partitions)
        }
        self._owners: dict[int, Owner] = {}
        self._checkpointed: dict[int, int] = {}
        self._claims: dict[int, tuple[str, float]] = {}
        """Partition -> whose the last claim is, and when this process saw it."""
        self._heartbeat: Heartbeat | None = None
        self._controller: str | None = None
        self._cleaner = ThreadPoolExecutor(1, thread_name_prefix="populace-compact")
        self._cleaning: Future[None] | None = None
        for partition, reader in self.readers.items():
            if (seq := restore(reader, self.catalog)) is not None:
                self._checkpointed[partition] = seq
        self.follow()

    @property
    def secrets(self) -> Secrets:
        return self.producer.secrets

    def pseudonym(self, user: str) -> str:
        """The name under which `user` stands in the logs: 128 bits of a keyed hash, hex."""
        return self.producer.pseudonym(user)

    def mask_seed(self, pseudonym: str, seed: int) -> int:
        """Hides a seed in the log, and brings it back: seeds follow from user ids, and nobody
        without the secrets may test a guess at who somebody is."""
        key = bytes.fromhex(self.secrets.pseudonym_key)
        digest = hmac.new(key, f"seed/{pseudonym}".encode(), hashlib.sha256).digest()
        return seed ^ (int.from_bytes(digest[:8], "big") >> 1)

    def refresh(self) -> None:
        """`follow`, and read new experience. Partitions that this process owns have nothing new
        from others."""
        for turn in range(3):
            self.follow()
            try:
                self.read_experience()
                return
            except (
                ObjectNotFound
            ):  # a snapshot that was replaced meanwhile; the record that says so is there now
                if turn == 2:
                    raise

    def read_experience(self) -> int:
        """Take in newly enqueued events, of the owned partitions once there was a claim; returns
        how many."""
        partitions = self.readers if self._heartbeat is None else sorted(self._owners)
        return sum(self.consumers[partition].observe(self.catalog) for partition in partitions)

    def enqueue(self, events: Mapping[str, Sequence[LogEvent]]) -> None:
        """Make users' events durable, commands included; see `Producer`."""
        self.producer.send(events)

    def events(self, partition: int, positions: Sequence[tuple[int, int]]) -> list[LoggedEvent]:
        """Events at their places in a partition's log, in that order; without those of forgotten
        users."""
        found = self.consumers[partition].load(positions, self.catalog)
        return [found[position] for position in positions if position in found]

    # Owning partitions.

    def claim(self, takeover_s: float, partitions: Iterable[int] | None = None) -> None:
        """Own these partitions, or all. Raises `OwnerAlive` when another process shows life within
        `takeover_s`."""
        wanted = sorted(self.readers if partitions is None else partitions)
        held = [partition for partition in wanted if self.catalog.owned.get(partition)]
        before = {partition: self._life(partition) for partition in held}
        if held:
            time.sleep(takeover_s)
        for partition in held:
            if self._life(partition) != before[partition]:
                raise OwnerAlive(
                    f"population {self.meta.name!r} is being run by another process "
                    f"({before[partition]}); "
                    "stop that one first, or wait for it"
                )
        seen = {partition: self.readers[partition].next_seq for partition in wanted}
        self.follow()
        if any(self.readers[partition].next_seq != seen[partition] for partition in wanted):
            raise OwnerAlive(
                f"population {self.meta.name!r} was written by another process just now; start "
                "again"
            )
        try:
            heartbeat = self._beat(takeover_s)
            for partition in wanted:
                self._own(partition, heartbeat)
            for partition, consumer in self.consumers.items():
                if partition not in self._owners:
                    consumer.let_go()
            self._finish_forgetting(wanted, bool(held))
        except BaseException:
            self.release()
            raise

    def join(
        self, controller: str, takeover_s: float, on_stop: Callable[[], None] = lambda: None
    ) -> None:
        """Become the controller of that name, owning nothing yet; see `rebalance`. `OwnerAlive`
        if there is one. `on_stop` is called, in a thread, when somebody asks this controller to
        stop."""
        heartbeat = self._beat(takeover_s)
        key = controller_key(self.meta.name, controller)
        if before := read_life(self.store, key):
            time.sleep(takeover_s)
            if read_life(self.store, key) != before:
                self.release()
                raise OwnerAlive(
                    f"population {self.meta.name!r} is being run by another process ({before}); "
                    "stop that one first, "
                    "or let this one share its partitions under another name: run.controller=NAME"
                )
        self._controller = controller
        heartbeat.announce(controller, on_stop)
        for consumer in self.consumers.values():
            consumer.let_go()

    def show(self, figures: Mapping[str, Any]) -> None:
        """Let others see these with this controller's signs of life."""
        if self._heartbeat is not None:
            self._heartbeat.figures = json.loads(
                json.dumps(figures)
            )  # what can't be written fails here

    def rebalance(
        self, takeover_s: float, before_release: Callable[[], None]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Claim and release partitions so that every controller that shows life has its share;
        returns what was claimed and what was released. `before_release` is called before anything
        is released: nothing may be under way then."""
        heartbeat = self._heartbeat
        assert heartbeat is not None
        self.follow()
        holders: dict[int, str | None] = {}
        for partition in self.readers:
            if partition in self._owners:
                holders[partition] = heartbeat.owner
            else:
                is_claimed = self.catalog.owned.get(partition)
                claim = self._claims.get(partition)
                holders[partition] = (
                    heartbeat.holder(partition, claim, takeover_s) if is_claimed else None
                )
        claims, releases = share_out(heartbeat.owner, holders, heartbeat.living(takeover_s))
        if releases:
            before_release()
        claimed, has_died = [], any(self.catalog.owned.get(partition) for partition in claims)
        for partition in claims:
            with contextlib.suppress(Fenced):  # somebody else was faster
                self._own(partition, heartbeat)
                claimed.append(partition)
        if claimed:
            self._finish_forgetting(claimed, has_died)
        for partition in releases:
            self._release(partition)
        return tuple(claimed), releases

    def release(self) -> None:
        """Give every partition back; a no-op without a claim. Whatever can't be given back is taken
        over later: no sign of life comes after this, also when it raises."""
        try:
            if self._cleaning is not None:
                self._cleaning.result()
                self._cleaning = None
            while self._owners:
                self._release(next(iter(self._owners)))
        except BaseException:
            self.give_up()
            raise
        if self._heartbeat is not None:
            self._heartbeat.stop()
            if self._controller is not None:
                with contextlib.suppress(PopulaceError):
                    self.store.delete(stop_key(self.meta.name, self._controller))
                    self.store.delete(controller_key(self.meta.name, self._controller))
            self._heartbeat = self._controller = None

    def give_up(self) -> None:
        """Stop owning without a word: the store is away, or what is in the logs isn't known any
        more. Whatever landed is read again by the next claim."""
        for partition, owner in self._owners.items():
            owner.lost_by = owner.lost_by or OutcomeUnknown("given up")
            self.catalog.owned[partition] = False
        self._owners.clear()
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = self._controller = None
        for consumer in self.consumers.values():
            consumer.let_go()

    def owned(self) -> list[int]:
        return sorted(self._owners)

    def _own(self, partition: int, heartbeat: Heartbeat) -> None:
        self._owners[partition] = Owner(self.readers[partition], heartbeat.owner, self.keyring)
        self.catalog.owned[partition] = True
        heartbeat.own(partition)
        if (done := self.catalog.compactions.get(partition)) is not None:
            self.consumers[partition].finish_compaction(done)

    def _release(self, partition: int) -> None:
        owner, heartbeat = self._owners.pop(partition), self._heartbeat
        self.catalog.owned[partition] = False
        if not owner.is_lost:
            with contextlib.suppress(Fenced):  # then it isn't ours to release; the others are
                owner.release()
                if heartbeat is not None:
                    heartbeat.disown(partition)
        if heartbeat is not None:
            heartbeat.drop(partition)
        if self._controller is not None:
            self.consumers[partition].let_go()

    def _beat(self, takeover_s: float) -> Heartbeat:
        """The heartbeat of this process; started if it isn't yet."""
        if self._heartbeat is None:
            name = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
            interval_s = min(HEARTBEAT_S, takeover_s / 4)
            self._heartbeat = Heartbeat(
                self.store, self.meta.name, self.meta.partitions, name, interval_s
            )
            self._heartbeat.start()
        return self._heartbeat

    def follow(self, partitions: Collection[int] | None = None) -> None:
        """Read the revision logs of these partitions; None: of those that this process doesn't
        write."""
        for partition in (
            self.readers.keys() - self._owners.keys() if partitions is None else partitions
        ):
            for header, record in self.readers[partition].read_new():
                self.apply(header, record)

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
        self.apply(self._owners[partition].append(record), record)

    def rewrap_keys(self) -> str:
        """Make a master key and wrap everything with it. The secrets first, so that new users' keys
        get it too."""
        new = replace(self.secrets, master=self.keyring.new_master_key())
        self.store.put(Secrets.path(self.meta.name), new.wrap(self.meta.name, self.keyring))
        self.producer.secrets = new
        for pseudonym in self.keys.pseudonyms():
            self.keys.rewrap(pseudonym, new.master)
        # A takeover meanwhile may have forgotten somebody whose key was just written again.
        self.follow(self.readers)
        self._finish_forgetting(self.readers, has_died=False)
        return new.master

    def apply(self, header: RecordHeader, record: Record) -> None:
        """Let the catalog and the pending index follow a record that is in the log."""
        self.catalog.apply(header, record)
        for part in parts_of(record):
            self.pending.follow(part)
            if isinstance(part, Claim):
                self._claims[header.partition] = (part.owner, time.monotonic())
            if isinstance(part, Tombstone):
                self.consumers[header.partition].forget(part.pseudonym)
                self.keys.drop([part.pseudonym])

    def checkpoint(self, every_records: int) -> None:
        """Save the catalog of owned partitions whose log has grown by that many records since the
        last time."""
        for partition, owner in self._owners.items():
            if owner.reader.next_seq - self._checkpointed.get(partition, -1) > every_records:
                seq = write_checkpoint(owner, self.catalog)
                if seq is not None:
                    self._checkpointed[partition] = seq

    def compact(self, every_segments: int) -> None:
        """Replace the experience that the owned partition with the longest log has read by a
        snapshot of what is still needed, if the log has grown by that many segments since the last
        time. Old segments are deleted in the background. One partition at a time, so that no wave
        waits for all."""
        if not self._owners or (self._cleaning is not None and not self._cleaning.done()):
            return
        grown = {partition: self.consumers[partition].next_segment for partition in self._owners}
        for partition, done in self.catalog.compactions.items():
            if partition in grown:
                grown[partition] -= done.floor
        partition = max(grown, key=grown.__getitem__)
        consumer, before = self.consumers[partition], self.catalog.compactions.get(partition)
        if grown[partition] < every_segments or not consumer.is_worth_a_snapshot():
            return
        if (
            before is not None
        ):  # the chain must have no gap, and the thread that raised this floor may have failed
            consumer.log.raise_floor(before.previous, before.floor)
        now = consumer.write_snapshot(self.catalog)
        self.append(partition, now)
        self._cleaning = self._cleaner.submit(self._clean, partition, now)

    def _clean(self, partition: int, now: Compaction) -> None:
        try:
            self.consumers[partition].finish_compaction(now)
        except (
            PopulaceError
        ) as error:  # the next compaction, or the next owner, raises the floor and deletes the rest
            logger.warning(
                "what lies below the floor of partition %d stays for now: %s", partition, error
            )

    def repack(self, rule: RetentionRule) -> RepackReport:
        """Drop what the rule lets go, in every owned partition."""
        report = RepackReport()
        for owner in self._owners.values():
            report += repack(owner, self.catalog, rule)
        return report

    def adapter(self, user: str) -> AdapterState:
        """The adapter of `user`; `InvalidInput` if there is none yet, `Forgotten` if there is none
        any more."""
        pseudonym = self.pseudonym(user)
        found = self.catalog.get(pseudonym)
        if found is not None:
            return found
        if self.catalog.is_forgotten(pseudonym):
            raise Forgotten(
                f"user {user!r} was forgotten; nothing of theirs can be read or written again"
            )
        raise InvalidInput(
            f"user {user!r} has no adapter in population {self.meta.name!r} yet; adapters are "
            "created when a "
            "run first learns from a user's experience"
        )

    def commit_of(self, adapter: AdapterState, revision: int) -> tuple[RecordHeader, WaveManifest]:
        """The record that committed a revision above 0; read from the log."""
        header, wave = self.readers[adapter.partition].read_at(
            self.catalog.revision_of(adapter.pseudonym, revision).seq
        )
        assert isinstance(wave, WaveManifest)
        return header, wave

    def ref(self, adapter: AdapterState, revision: int) -> AdapterRef:
        """How workers find a revision's bytes; `InvalidInput` if they were dropped."""
        self.catalog.loadable(adapter, revision)
        return revision_ref(
            adapter, self.catalog.revision_of(adapter.pseudonym, revision) if revision else None
        )

    def entry(self, adapter: AdapterState, revision: int) -> RevisionEntry:
        """All that the wave record says of a revision above 0."""
        return self.commit_of(adapter, revision)[1].entry(adapter.pseudonym, revision)

    def obey_commands(self, busy: Collection[str] = ()) -> list[Verdict | Tombstone]:
        """Execute the commands that users' logs hold, in order, each once; those of `busy` users
        wait."""
        done: list[Verdict | Tombstone] = []
        for partition in sorted(self._owners):
            consumer, waiting = self.consumers[partition], []
            for logged in list(consumer.commands):
                if logged.pseudonym in busy:
                    waiting.append(logged)
                elif isinstance(logged.event, Forget):
                    done.append(self._forget(logged))
                elif (adapter := self.catalog.get(logged.pseudonym)) is not None:
                    verdict = _answer(self.catalog, adapter, logged)
                    self.append(adapter.partition, verdict)
                    done.append(verdict)
                elif not self.catalog.is_forgotten(logged.pseudonym):
                    waiting.append(logged)  # until there is an adapter
            gone = {record.pseudonym for record in done if isinstance(record, Tombstone)}
            consumer.commands = [logged for logged in waiting if logged.pseudonym not in gone]
        return done

    def _finish_forgetting(self, partitions: Collection[int], has_died: bool) -> None:
        """An owner may have died between a tombstone and the end of the key, or before it told the
        producers."""
        forgotten = self.catalog.forgotten(partitions)
        for pseudonym in forgotten:
            if not self.keys.is_forgotten(pseudonym):
                self._erase(pseudonym)
        if forgotten and has_died:
            self.keys.begin_era()

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
        """Pseudonym -> user id, for every user with experience or an adapter."""
        known = {*self.pending.pseudonyms(), *(adapter.pseudonym for adapter in self.catalog)}
        found = {}
        for pseudonym in known:
            with contextlib.suppress(Forgotten):
                found[pseudonym] = self.keys.get(pseudonym).user
        return found

    def _life(self, partition: int) -> str:
        return read_life(self.store, owner_key(self.meta.name, partition))
