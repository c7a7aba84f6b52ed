"""Claims, heartbeats and rebalancing as a protocol on a virtual clock: controllers that beat late,
look late, die without a word and come back, in any order. The log alone decides who may write."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run

from populace.population.ledger.heartbeat import Heartbeat
from populace.population.ledger.ledger import Ledger
from populace.population.ledger.ownership import Ownership
from populace.storage.errors import Fenced
from populace.storage.log.reader import RevisionLogReader
from populace.storage.log.records import Attempt, Claim, Record, RecordHeader, Release
from populace.storage.log.verify import Findings, verify_partition
from populace.storage.objects.cloud import MemoryStore
from tests.support.loops import ledger_of
from tests.support.streams import make_population

PARTITIONS, TAKEOVER_S = 4, 4.0
NAMES = ("a", "b", "c")
CHANGES = (Claim, Release)
names = st.sampled_from(NAMES)


@dataclass
class Process:
    """One controller; its heartbeat is driven by the test, not by a thread."""

    ledger: Ledger
    ownership: Ownership
    heartbeat: Heartbeat


class Protocol(RuleBasedStateMachine):
    """What must hold whatever the clocks do: a partition's log never goes back to an older claim;
    who was overtaken is fenced; and once the living beat and look, everything has one owner and
    everybody a fair share."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        clock = SimpleNamespace(
            monotonic=lambda: self.now, time=lambda: self.now, sleep=self.advance
        )
        self.patches = [
            mock.patch("populace.population.ledger.heartbeat.time", clock),
            mock.patch("populace.population.ledger.ownership.time", clock),
            mock.patch("populace.population.ledger.ledger.time", clock),
        ]
        for patch in self.patches:
            patch.start()
        self.store = MemoryStore()
        self.meta = make_population(self.store, partitions=PARTITIONS)
        self.living: dict[str, Process] = {}
        self.zombies: list[Process] = []
        """Dead to the others, but still about to write."""
        self.beats = 0

    @initialize()
    def first_joins(self) -> None:
        self.joins("a")

    @rule(seconds=st.floats(0.1, 6.0))
    def advance(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=names)
    def joins(self, name: str) -> None:
        if name in self.living:
            return
        ledger = ledger_of(self.store, self.meta)
        ownership = Ownership(ledger)
        self.beats += 1
        heartbeat = Heartbeat(self.store, self.meta.name, PARTITIONS, f"{name}/{self.beats}", 1.0)
        heartbeat.announce(name, lambda: None)
        ownership._heartbeat, ownership._controller = heartbeat, name
        ledger.is_selective = True
        self.living[name] = Process(ledger, ownership, heartbeat)

    @rule(name=names)
    def beats_and_looks(self, name: str) -> None:
        if (process := self.living.get(name)) is not None:
            self.beats += 1
            process.heartbeat._beat(self.beats)
            process.heartbeat._look(name)

    @rule(name=names)
    def rebalances(self, name: str) -> None:
        if (process := self.living.get(name)) is not None:
            process.ownership.rebalance(TAKEOVER_S, lambda: None)

    @rule(name=names)
    def dies(self, name: str) -> None:
        if (process := self.living.pop(name, None)) is not None:
            self.zombies.append(process)

    @rule(name=names)
    def writes(self, name: str) -> None:
        if (process := self.living.get(name)) is not None:
            self.write(process)

    @rule(number=st.integers(0, 3))
    def a_zombie_writes(self, number: int) -> None:
        if self.zombies:
            self.write(self.zombies[number % len(self.zombies)])

    def write(self, process: Process) -> None:
        """Into every partition that it believes to own. It is told when it is wrong, and then the
        newest claim in the log isn't its own."""
        for partition, owner in list(process.ledger.owners.items()):
            newest = [
                record for _, record in self.records(partition) if isinstance(record, CHANGES)
            ][-1]
            try:
                process.ledger.append(partition, Attempt(wave="w", num_adapters=0, adapters={}))
                assert isinstance(newest, Claim) and newest.owner == owner.name
            except Fenced:
                assert newest.owner != owner.name
                del process.ledger.owners[partition]
                process.ledger.catalog.owned[partition] = False
                process.heartbeat.drop(partition)

    def records(self, partition: int) -> list[tuple[RecordHeader, Record]]:
        """A partition's whole log, read by somebody else."""
        reader = RevisionLogReader(self.store, "pop", partition, self.meta.root_key)
        return list(reader.read_new())

    @invariant()
    def claims_only_move_forward(self) -> None:
        for partition in range(PARTITIONS):
            newest, epoch = "", -1
            for header, record in self.records(partition):
                if isinstance(record, Claim):
                    newest = record.owner
                    assert header.epoch == header.seq
                    epoch = header.seq
                assert newest and header.epoch == epoch, "written under the newest claim"

    def teardown(self) -> None:
        try:
            self.settles_down()
        finally:
            for patch in self.patches:
                patch.stop()

    def settles_down(self) -> None:
        """The living beat, look and rebalance for some takeover times; the dead stay dead."""
        for _ in range(16):
            self.now += 1.0
            for name in sorted(self.living):
                self.beats_and_looks(name)
                self.write(self.living[name])
                self.rebalances(name)
        for zombie in self.zombies:
            self.write(zombie)
        self.claims_only_move_forward()
        counts = [len(process.ledger.owned()) for process in self.living.values()]
        if counts:
            assert sum(counts) == PARTITIONS, "each partition has one owner"
            assert max(counts) - min(counts) <= 1, "everybody has a fair share"
        for partition in range(PARTITIONS):
            findings = Findings()
            verify_partition(self.store, "pop", partition, self.meta.root_key, findings)
            assert findings.problems == []


def test_one_owner_per_partition_whatever_the_clocks_do() -> None:
    run(
        Protocol,
        settings=hypothesis.settings(max_examples=40, stateful_step_count=30, deadline=None),
    )
