"""Who has what to learn from: columns in memory, no I/O and no object per user or event.

    users    one row per user who ever had an event here, chained to its events
    events   one row per event that is not accounted for yet, or held out; rows of finished ones are used again

Derived state: `consumer.py` fills it from the experience log, `follow` empties it as the revision log says.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from populace.population.scheduler import Candidates
from populace.storage.catalog import Catalog
from populace.storage.columns import Index, Table, halves_of
from populace.storage.records import Position, Record, Settled, WaveManifest

PENDING, CLASH, OUT_OF_ORDER, HELD = 1, 2, 3, 4
"""States of an event: to be trained on; to be settled because its id was used before with other content, or is an
integer that doesn't increase; kept for evaluation."""
REASONS = {
    CLASH: "event id reused with other content",
    OUT_OF_ORDER: "event id does not increase: integer ids of a user must",
}

NONE = -1


class EventAt(NamedTuple):
    """An event that waits, or is held out."""

    position: Position
    state: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Survivors:
    """What a partition's snapshot has to keep, in the order of the log."""

    segment: NDArray[np.uint32]
    row: NDArray[np.uint32]
    state: NDArray[np.uint8]
    tokens: NDArray[np.uint32]


class PendingIndex:
    """`events_per_update`: as many events as one update takes at most; their tokens are what a user's turn costs."""

    def __init__(self, events_per_update: int = 1) -> None:
        self.events_per_update = events_per_update
        self.users = Table(
            high="u8", low="u8", partition="u2", tenant="u2", adapter="i4", head="i4", tail="i4", held="i4",
            held_tail="i4", num_waiting="u4", num_pending="u4", num_held="u4", tokens="u4", since="f8", updated="f8",
            is_hot="?", is_busy="?",
        )  # fmt: skip
        self.events = Table(user="u4", segment="u4", row="u4", next="i4", tokens="u4", state="u1")
        self.index = Index()
        self._free: list[int] = []
        self._epoch = time.time()
        self._turns = 0

    # Filling.

    def add_user(self, pseudonym: str, partition: int, tenant: int = 0, adapter: int = NONE) -> int:
        """A row for a new user; `adapter`: its row in the catalog, if there is one."""
        high, low = halves_of([pseudonym])
        row = self.users.append(
            1, high=high, low=low, partition=partition, tenant=tenant, adapter=adapter, head=NONE, tail=NONE,
            held=NONE, held_tail=NONE, num_waiting=0, num_pending=0, num_held=0, tokens=0, since=0.0,
            updated=-np.inf, is_hot=False, is_busy=False,
        )  # fmt: skip
        self.index.add(high, low, np.array([row]))
        return row

    def add(self, user: int, position: Position, state: int, tokens: int, arrived_at: float) -> None:
        """Append an event to a user's chain; `arrived_at`: seconds since 1970."""
        event = (
            self._free.pop()
            if self._free
            else self.events.append(1, user=0, segment=0, row=0, next=0, tokens=0, state=0)
        )
        events, users = self.events, self.users
        events["user"][event], events["next"][event], events["state"][event] = user, NONE, state
        events["segment"][event], events["row"][event] = position
        events["tokens"][event] = tokens
        first, last = ("held", "held_tail") if state == HELD else ("head", "tail")
        if users[first][user] == NONE:
            users[first][user] = event
        else:
            events["next"][users[last][user]] = event
        users[last][user] = event
        if state == HELD:
            users["num_held"][user] += 1
            return
        if not users["num_waiting"][user]:
            users["since"][user] = self._in_line(min(arrived_at, time.time()))
        users["num_waiting"][user] += 1
        if state == PENDING:
            if users["num_pending"][user] < self.events_per_update:
                users["tokens"][user] += tokens
            users["num_pending"][user] += 1

    # Emptying.

    def follow(self, record: Record) -> None:
        """Drop what a record accounts for."""
        match record:
            case WaveManifest():
                for entry in record.revisions:
                    self.consume(entry.pseudonym, entry.consumed)
            case Settled():
                self.consume(record.pseudonym, record.consumed)

    def consume(self, pseudonym: str, consumed: Position) -> None:
        """Everything of the user up to here is accounted for. Who has more gets in at the end of the line."""
        if (user := self.row_of(pseudonym)) is None:
            return
        users, events = self.users, self.events
        event, num_gone = int(users["head"][user]), 0
        while event != NONE and (int(events["segment"][event]), int(events["row"][event])) <= consumed:
            users["num_pending"][user] -= events["state"][event] == PENDING
            num_gone += 1
            following = int(events["next"][event])
            self._drop(event)
            event = following
        users["head"][user] = event
        users["num_waiting"][user] -= num_gone
        if event == NONE:
            users["tail"][user] = NONE
        if num_gone:
            now = time.time()
            users["since"][user], users["updated"][user] = self._in_line(now), now - self._epoch
            users["tokens"][user] = self._next_tokens(event)

    def forget(self, pseudonym: str) -> None:
        """Drop everything of a user."""
        if (user := self.row_of(pseudonym)) is not None:
            self._clear(user)

    def clear_partition(self, partition: int) -> None:
        """Drop everything of a partition: another process has it, or it is about to be read anew."""
        rows = np.flatnonzero(
            (self.users["partition"] == partition) & ((self.users["num_waiting"] + self.users["num_held"]) > 0)
        )
        for user in rows.tolist():
            self._clear(user)

    # Looking.

    def row_of(self, pseudonym: str) -> int | None:
        row = int(self.index.find(*halves_of([pseudonym]))[0])
        return None if row < 0 else row

    def waiting(self, pseudonym: str, limit: int | None = None) -> list[EventAt]:
        """A user's events that wait, oldest first; at most `limit` of those to be trained on."""
        if (user := self.row_of(pseudonym)) is None:
            return []
        found, num_pending = [], 0
        for event in self._chain(int(self.users["head"][user])):
            item = self._at(event)
            if item.state == PENDING:
                if num_pending == limit:
                    break
                num_pending += 1
            found.append(item)
        return found

    def heldout(self, pseudonym: str) -> list[Position]:
        """A user's held-out events, oldest first."""
        user = self.row_of(pseudonym)
        return (
            [] if user is None else [self._at(event).position for event in self._chain(int(self.users["held"][user]))]
        )

    def has_events(self, pseudonym: str) -> bool:
        """Whether anything of the user waits or is held out."""
        user = self.row_of(pseudonym)
        return user is not None and bool(self.users["num_waiting"][user] or self.users["num_held"][user])

    def num_pending(self) -> int:
        return int(self.users["num_pending"].sum())

    def num_heldout(self) -> int:
        return int(self.users["num_held"].sum())

    def oldest_wait_s(self) -> float:
        """How long the user at the head of the line has waited; 0 without any."""
        waiting = self.users["num_waiting"] > 0
        return float(time.time() - self._epoch - self.users["since"][waiting].min()) if waiting.any() else 0.0

    def survivors(self, partition: int, floor: int) -> Survivors:
        """Events of a partition below segment `floor` that wait or are held out."""
        events, users = self.events, self.users
        alive = np.flatnonzero(events["state"] > 0)
        alive = alive[(users["partition"][events["user"][alive]] == partition) & (events["segment"][alive] < floor)]
        order = alive[np.lexsort((events["row"][alive], events["segment"][alive]))]
        return Survivors(**{name: events[name][order].copy() for name in ("segment", "row", "state", "tokens")})

    def candidates(self, catalog: Catalog, load_bytes_per_rank: float = 0.0) -> tuple[NDArray[np.int64], Candidates]:
        """Rows of the users who may be in a wave, and what the scheduler has to know of them."""
        users = self.users
        rows = np.flatnonzero((users["num_waiting"] > 0) & ~users["is_busy"])
        adapter = users["adapter"][rows]
        rank = catalog.ranks_of(adapter)
        is_hot = users["is_hot"][rows]
        return rows, Candidates(
            since_U=users["since"][rows],
            num_events_U=users["num_pending"][rows],
            tokens_U=users["tokens"][rows],
            tenant_U=users["tenant"][rows],
            rank_U=rank,
            load_bytes_U=np.where(is_hot | (adapter < 0), 0.0, rank * load_bytes_per_rank),
            is_hot_U=is_hot,
            updated_U=users["updated"][rows],
        )

    def now(self) -> float:
        """The time by which users wait, in seconds."""
        return time.time() - self._epoch

    def pseudonym(self, user: int) -> str:
        return f"{int(self.users['high'][user]):016x}{int(self.users['low'][user]):016x}"

    def pseudonyms(self) -> list[str]:
        """Everybody with an event that waits or is held out."""
        rows = np.flatnonzero((self.users["num_waiting"] + self.users["num_held"]) > 0)
        return [self.pseudonym(int(row)) for row in rows]

    # Marks.

    def mark_busy(self, pseudonyms: Sequence[str], is_busy: bool) -> None:
        """Users in an uncommitted wave are in no other."""
        self._rows_mark("is_busy", pseudonyms, is_busy)

    def mark_hot(self, pseudonyms: Sequence[str]) -> None:
        """Whose adapters the workers hold now; nobody else's."""
        self.users["is_hot"][:] = False
        self._rows_mark("is_hot", pseudonyms, True)

    def mark_adapters(self, pseudonyms: Sequence[str], catalog: Catalog) -> None:
        """Remember the catalog's rows of these users."""
        if pseudonyms:
            rows = self.index.find(*halves_of(pseudonyms))
            self.users["adapter"][rows[rows >= 0]] = catalog.rows_of(pseudonyms)[rows >= 0]

    def _rows_mark(self, column: str, pseudonyms: Sequence[str], value: bool) -> None:
        if pseudonyms:
            rows = self.index.find(*halves_of(pseudonyms))
            self.users[column][rows[rows >= 0]] = value

    def _in_line(self, at: float) -> float:
        """A place in the line: later calls for the same time come later."""
        self._turns += 1
        return at - self._epoch + 1e-9 * self._turns

    def _chain(self, event: int) -> Iterator[int]:
        while event != NONE:
            yield event
            event = int(self.events["next"][event])

    def _next_tokens(self, event: int) -> int:
        tokens = num_events = 0
        for item in self._chain(event):
            if num_events == self.events_per_update:
                break
            if self.events["state"][item] == PENDING:
                tokens, num_events = tokens + int(self.events["tokens"][item]), num_events + 1
        return tokens

    def _at(self, event: int) -> EventAt:
        events = self.events
        return EventAt((int(events["segment"][event]), int(events["row"][event])), int(events["state"][event]))

    def _drop(self, event: int) -> None:
        self.events["state"][event] = 0
        self._free.append(event)

    def _clear(self, user: int) -> None:
        users = self.users
        for first, last in (("head", "tail"), ("held", "held_tail")):
            for event in list(self._chain(int(users[first][user]))):
                self._drop(event)
            users[first][user] = users[last][user] = NONE
        for name in ("num_waiting", "num_pending", "num_held", "tokens"):
            users[name][user] = 0
