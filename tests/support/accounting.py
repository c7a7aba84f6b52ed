"""Where every acknowledged event ended, read from the logs alone and independently of the
catalog."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from populace.population.client import Population
from populace.population.experience.events import Command
from populace.population.experience.log import ExperienceLog
from populace.population.experience.segments import partition_of
from populace.storage.log.reader import RevisionLogReader
from populace.storage.log.records import Settled, WaveManifest, parts_of

Name = tuple[str, str]
"""(user, event id)."""


@dataclass(frozen=True)
class Outcome:
    acknowledged: dict[str, set[str]]
    trained: Counter[Name]
    settled: Counter[Name]
    heldout: set[Name]
    reasons: dict[Name, str]
    clashes: dict[Name, str]

    def is_exact(self) -> bool:
        """Every acknowledged event is in exactly one of trained, settled, held out, and there
        once."""
        everything = {
            (user, event) for user, events in self.acknowledged.items() for event in events
        }
        ends = self.trained + self.settled + Counter(self.heldout)
        return set(ends) == everything and set(ends.values()) <= {1}


def account(population: Population) -> Outcome:
    meta, seals = population.meta, population.ledger.seals
    acknowledged: dict[str, set[str]] = {}
    user_of: dict[str, str] = {}
    id_of: dict[str, str] = {}
    for partition in range(meta.partitions):
        for segment, table in ExperienceLog(population.store, meta.name, partition).read_from(0):
            for index, row in enumerate(table.to_pylist()):
                logged = seals.open(row, (segment, index))
                user_of[logged.pseudonym] = logged.user
                id_of[logged.ref.tag] = logged.event.event_id
                if not isinstance(logged.event, Command):
                    acknowledged.setdefault(logged.user, set()).add(logged.event.event_id)
    trained: Counter[Name] = Counter()
    settled: Counter[Name] = Counter()
    reasons, clashes = {}, {}
    for partition in range(meta.partitions):
        reader = RevisionLogReader(population.store, meta.name, partition, meta.root_key)
        for record in (part for _, whole in reader.read_new() for part in parts_of(whole)):
            entries = []
            if isinstance(record, WaveManifest):
                entries = [
                    (entry.pseudonym, entry.trained, entry.settled) for entry in record.revisions
                ]
            elif isinstance(record, Settled):
                entries = [(record.pseudonym, [], record.events)]
            for pseudonym, learned, out in entries:
                user = user_of[pseudonym]
                trained.update((user, id_of[ref.tag]) for ref in learned)
                for item in out:
                    name = (user, id_of[item.event.tag])
                    if item.reason.startswith("event id reused"):
                        clashes[name] = item.reason
                        continue
                    settled[name] += 1
                    reasons[name] = item.reason + seals.detail(pseudonym, item)
    population.ledger.refresh()
    pending = population.ledger.pending
    heldout = {
        (logged.user, logged.event.event_id)
        for pseudonym in pending.pseudonyms()
        for logged in population.ledger.events(
            partition_of(user_of[pseudonym], meta.partitions), pending.heldout(pseudonym)
        )
    }
    return Outcome(acknowledged, trained, settled, heldout, reasons, clashes)
