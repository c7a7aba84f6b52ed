"""Attempts without an outcome: which events were being tried, how often, and whose tries failed.

A controller logs an attempt before it tries anything. Whatever an attempt has no outcome for when a
new owner looks, died with the old one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from populace.storage.log.records import Attempt, EventRef, Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Tries:
    """How often one event of a user was tried in a row.

    Example: `Tries(event=ref, count=2, is_alone=False)`, after two waves with this event died."""

    event: EventRef
    """The event; for an attempt, the first of the user's events that were tried."""
    count: int
    is_alone: bool = False
    """Whether the last attempt was of this event alone."""


class Attempts:
    """What no outcome has followed yet, by user. Filled by `applying.py`, saved in checkpoints."""

    def __init__(self) -> None:
        self.tries: dict[str, Tries] = {}
        """Pseudonym -> attempts without an outcome: all but one that may be under way died."""
        self.failures: dict[str, Tries] = {}
        """Pseudonym -> the event whose tries failed last."""
        self.unfinished: dict[int, dict[str, list[EventRef]]] = {}
        """Per partition: pseudonym -> the events whose attempt no outcome has followed."""

    def begin(self, partition: int, attempt: Attempt) -> None:
        """An attempt was logged. A user without events in it: the attempt before is taken back."""
        tried = self.unfinished.setdefault(partition, {})
        tried.update({pseudonym: refs for pseudonym, refs in attempt.adapters.items() if refs})
        self._finish(
            partition, [pseudonym for pseudonym, refs in attempt.adapters.items() if not refs]
        )
        for pseudonym, refs in attempt.adapters.items():
            before = self.tries.get(pseudonym)
            if refs:
                count = before.count + 1 if before is not None and before.event == refs[0] else 1
                is_alone = attempt.num_adapters == 1 and len(refs) == 1
                self.tries[pseudonym] = Tries(event=refs[0], count=count, is_alone=is_alone)
            elif before is not None and before.count > 1:
                self.tries[pseudonym] = Tries(event=before.event, count=before.count - 1)
            else:
                self.tries.pop(pseudonym, None)

    def fail(self, partition: int, failed: Failed) -> None:
        """One try of an event failed in a way that may pass."""
        before = self.failures.get(failed.pseudonym)
        count = before.count + 1 if before is not None and before.event == failed.event else 1
        self.failures[failed.pseudonym] = Tries(event=failed.event, count=count)
        self.tries.pop(failed.pseudonym, None)
        self._finish(partition, [failed.pseudonym])

    def end(self, partition: int, pseudonyms: Collection[str]) -> None:
        """The users' attempts had an outcome: a revision, settled events, or erasure."""
        for pseudonym in pseudonyms:
            self.failures.pop(pseudonym, None)
            self.tries.pop(pseudonym, None)
        self._finish(partition, pseudonyms)

    def _finish(self, partition: int, pseudonyms: Collection[str]) -> None:
        tried = self.unfinished.get(partition, {})
        for pseudonym in pseudonyms:
            tried.pop(pseudonym, None)
        if not tried:
            self.unfinished.pop(partition, None)
