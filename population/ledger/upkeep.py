"""What keeps a population small and its keys fresh: checkpoints, compaction, repacks, rewrapping.
The owner of a partition alone does any of it."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from populace.population.ledger.commands import finish_erasures
from populace.population.ledger.ledger import Ledger
from populace.storage import paths
from populace.storage.catalog.checkpoint import write_checkpoint
from populace.storage.catalog.repack import RepackReport, RetentionRule, repack
from populace.storage.errors import PopulaceError
from populace.storage.keys.secrets import Secrets
from populace.storage.log.records import Compaction

logger = logging.getLogger(__name__)


class Upkeep:
    """Upkeep of the partitions that `ledger` owns."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._cleaner = ThreadPoolExecutor(1, thread_name_prefix="populace-compact")
        self._cleaning: Future[None] | None = None

    def checkpoint(self, every_records: int) -> None:
        """Save the catalog of owned partitions whose log has grown by that many records since the
        last time."""
        ledger = self.ledger
        for partition, owner in ledger.owners.items():
            grown = owner.reader.next_seq - ledger.checkpointed.get(partition, -1)
            if grown > every_records:
                seq = write_checkpoint(owner, ledger.catalog)
                if seq is not None:
                    ledger.checkpointed[partition] = seq

    def compact(self, every_segments: int) -> None:
        """Replace the experience that the owned partition with the longest log has read by a
        snapshot of what is still needed, if the log has grown by that many segments since the last
        time. Old segments are deleted in the background. One partition at a time, so that no wave
        waits for all."""
        ledger = self.ledger
        if not ledger.owners or (self._cleaning is not None and not self._cleaning.done()):
            return
        compactions = ledger.catalog.compactions
        grown = {
            partition: ledger.consumers[partition].next_segment
            - (compactions[partition].floor if partition in compactions else 0)
            for partition in ledger.owners
        }
        partition = max(grown, key=grown.__getitem__)
        consumer, before = ledger.consumers[partition], compactions.get(partition)
        if grown[partition] < every_segments or not consumer.is_worth_a_snapshot():
            return
        # The chain must have no gap, and the thread that raised this floor may have failed.
        if before is not None:
            consumer.log.raise_floor(before.previous, before.floor)
        now = consumer.write_snapshot(ledger.catalog)
        ledger.append(partition, now)
        self._cleaning = self._cleaner.submit(self._clean, partition, now)

    def repack(self, rule: RetentionRule) -> RepackReport:
        """Drop what the rule lets go, in every owned partition."""
        report = RepackReport()
        for owner in self.ledger.owners.values():
            report += repack(owner, self.ledger.catalog, rule)
        return report

    def close(self) -> None:
        """Wait for what is being deleted, and end the thread."""
        self._cleaner.shutdown()

    def _clean(self, partition: int, now: Compaction) -> None:
        try:
            self.ledger.consumers[partition].finish_compaction(now)
        except PopulaceError as error:
            # The next compaction, or the next owner, raises the floor and deletes the rest.
            logger.warning(
                "what lies below the floor of partition %d stays for now: %s", partition, error
            )


def rewrap_keys(ledger: Ledger) -> str:
    """Make a master key and wrap everything with it; returns its name. All partitions are owned."""
    keys, population = ledger.keys, ledger.meta.name
    # The secrets first, so that new users' keys get it too.
    before = Secrets.read(ledger.store, population, keys.keyring)
    new = replace(before, master=keys.keyring.new_master_key())
    ledger.store.put(paths.secrets(population), new.wrap(population, keys.keyring))
    for pseudonym in keys.pseudonyms():
        keys.rewrap(pseudonym, new.master)
    # A takeover meanwhile may have erased somebody whose key was just written again.
    ledger.follow(ledger.readers)
    finish_erasures(ledger, ledger.readers, has_died=False)
    return new.master
