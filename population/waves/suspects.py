"""What may have killed a controller: it is tried again in small waves, then alone, then parked.

An attempt is in the log before anything of it is tried. One without an outcome died with its
controller, or with the shards, and its events are suspect: what kills is found soon, and what was
only beside it isn't blamed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from populace.population.experience.states import REASONS, EventState
from populace.population.ledger.ledger import Ledger
from populace.population.waves.outcomes import MAX_TRIES
from populace.storage.catalog.attempts import Tries
from populace.storage.log.records import Attempt, EventRef, Position, Settled, SettledEvent

SUSPECTS_SHARE = 8
"""What died in a full wave is tried again in waves of this part of one."""


class Suspects:
    """The suspects of the partitions that `ledger` owns."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._last: dict[str, Position] = {}
        """User -> where the last of the events lies that were being tried when somebody died."""
        self.suspect_unfinished()

    def suspect_unfinished(self, partitions: Sequence[int] | None = None) -> None:
        """Suspect every event whose attempt has no outcome. `partitions`: those that were just
        taken over; None: all."""
        unfinished = self.ledger.catalog.attempts.unfinished
        for partition in self.ledger.owned() if partitions is None else partitions:
            for pseudonym, refs in unfinished.get(partition, {}).items():
                self._last[pseudonym] = max(ref.position for ref in refs)

    def forgive(self, partitions: Sequence[int]) -> None:
        """Take back the attempts that this run gave up because the store went away: it wasn't the
        events' fault."""
        unfinished = self.ledger.catalog.attempts.unfinished
        for partition in partitions:
            gone: dict[str, list[EventRef]] = {name: [] for name in unfinished.get(partition, {})}
            if gone:
                attempt = Attempt(wave="given up", num_adapters=len(gone), adapters=gone)
                self.ledger.append(partition, attempt)

    def users(self) -> list[str]:
        """Users whose next event is suspect, in order; the others are cleared."""
        for pseudonym, last in list(self._last.items()):
            waiting = self.ledger.pending.waiting(pseudonym, 1)
            if not any(
                item.position <= last for item in waiting if item.state is EventState.PENDING
            ):
                del self._last[pseudonym]
        return sorted(self._last)

    def died_twice(self, suspects: Collection[str]) -> list[str]:
        """Suspects of whom two attempts died: they are tried one event at a time, alone."""
        tries = self.ledger.catalog.attempts.tries
        return [name for name in suspects if name in tries and tries[name].count > 1]

    def park_killers(self, busy: Collection[str]) -> list[Settled]:
        """Settle every event whose attempts died too often, the last one alone: it is what kills
        the controller. Users in an uncommitted wave are `busy`."""
        parked = []
        for pseudonym, tries in list(self.ledger.catalog.attempts.tries.items()):
            if tries.count < MAX_TRIES or not tries.is_alone or pseudonym in busy:
                continue
            adapter = self.ledger.catalog.get(pseudonym)
            if adapter is None or adapter.partition not in self.ledger.owners:
                continue
            record = self._parked(pseudonym, adapter.partition, tries)
            self.ledger.append(adapter.partition, record)
            parked.append(record)
        return parked

    def _parked(self, pseudonym: str, partition: int, tries: Tries) -> Settled:
        """The killer, and what has to be settled before it."""
        killer = tries.event
        before = {
            item.position: item.state
            for item in self.ledger.pending.waiting(pseudonym)
            if item.position < killer.position and item.state is not EventState.PENDING
        }
        events = self.ledger.events(partition, list(before))
        settled = [
            SettledEvent(event=logged.ref, reason=REASONS[before[logged.ref.position]])
            for logged in events
        ]
        reason = (
            f"parked: {tries.count} attempts did not survive, the last one with this event alone"
        )
        settled.append(SettledEvent(event=killer, reason=reason))
        return Settled(pseudonym=pseudonym, events=settled, consumed=killer.position)
