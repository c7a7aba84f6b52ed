"""What whoever takes experience promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from populace.population.experience.checks import CheckedEvent, check_events
from populace.population.experience.events import LogEvent

Checked = Mapping[str, Sequence[CheckedEvent]]
"""User -> events that `check_events` let through."""


class Enqueues(ABC):
    """Whoever takes experience: a `Producer`, a `Gateway`, a `Population`. All events of a call are
    checked before any is written; sending an event again (same id, same content) is harmless,
    through whatever way.

    `InvalidInput`: nothing was written. `Overloaded`: nothing was written, try again when it says.
    `Forgotten`: the user was erased. `OutcomeUnknown`: the store does not answer; send again."""

    rewards: Mapping[str, str] | None
    """Registered rewards, against which tasks are checked; None: tasks may name any."""

    def enqueue(self, user: str, events: Iterable[LogEvent]) -> int:
        """Make a user's events durable, in order; returns their number."""
        return self.enqueue_many([(user, events)])

    def enqueue_many(self, pairs: Iterable[tuple[str, Iterable[LogEvent]]]) -> int:
        """`enqueue` for many users at once; their events share segments."""
        return self.send(check_events(pairs, self.rewards))

    async def enqueue_async(self, user: str, events: Iterable[LogEvent]) -> int:
        """`enqueue` for asyncio. Calls under way together are written in their order."""
        return await self.enqueue_many_async([(user, events)])

    async def enqueue_many_async(self, pairs: Iterable[tuple[str, Iterable[LogEvent]]]) -> int:
        """`enqueue_many` for asyncio."""
        return await self.send_async(check_events(pairs, self.rewards))

    @abstractmethod
    def send(self, events: Checked) -> int:
        """Make what `check_events` returned durable; returns the number of events."""

    @abstractmethod
    async def send_async(self, events: Checked) -> int:
        """`send` for asyncio."""
