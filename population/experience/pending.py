"""Who has what to learn from: columns in memory, no I/O and no object per user or event.

    users    one row per user who ever had an event here, chained to its events
    events   one row per event that is not accounted for yet, or held out; rows are used again

Derived state: `consumer.py` fills it from the experience log, `follow` empties it as the revision
log says.

Suffixes: U users with something waiting.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from populace.population.experience.states import EventAt, EventState
from populace.storage.catalog.columns import Index, Table, halves_of
from populace.storage.log.records import Position, Record, Settled, WaveManifest

Floats = NDArray[np.float64]


NONE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Everybody who may be in the next wave: rows of columns that hold others too.

    Example: `row_U = [4, 9]` with `tokens[4] = 820`: the user in row 4 waits with an update of
    about 820 tokens."""

    row_U: NDArray[np.int64]
    since: Floats
    """Seconds; when the user got in line."""
    num_events: NDArray[np.uint32]
    """To be trained on."""
    tokens: NDArray[np.uint32]
    """Tokens of the next update, estimated."""
    tenant: NDArray[np.uint16]
    rank: NDArray[np.uint32]
    """Rank of the adapter, or of the one that the user will get."""
    is_hot: NDArray[np.bool_]
    updated: Floats
    """Seconds; the last update, minus infinity for none."""
    load_bytes_per_rank: float = 0.0
    """What an adapter that isn't hot costs to page in."""


class PendingIndex:
    """Everybody's events that wait or are held out, in the order of their arrival."""

    def __init__(self, events_per_update: int = 1) -> None:
        """`events_per_update`: as many events as one update takes at most; their tokens are what a
        user's turn costs."""
        self.events_per_update = events_per_update
        self.users = Table(
            high="u8", low="u8", partition="u2", tenant="u2", rank="u4", head="i4", tail="i4",
            held="i4",
            held_tail="i4", num_waiting="u4", num_pending="u4", num_held="u4", tokens="u4",
            since="f8", updated="f8",
            is_hot="?", is_busy="?", is_candidate="?",
        )  # fmt: skip
        self.events = Table(user="u4", segment="u4", row="u4", next="i4", tokens="u4", state="u1")
        self.index = Index()
        self._free: list[int] = []
        self._candidates = np.zeros(0, np.int64)
        self._joined: list[int] = []
        """Users who may have become candidates since these were put together."""
        self._epoch = time.time()
        self._turns = 0

    # Adding.

    def add_user(self, pseudonym: str, partition: int, tenant: int = 0, rank: int = 0) -> int:
        """A row for a new user; `rank`: of the adapter, if there is one."""
        high, low = halves_of([pseudonym])
        row = self.users.append(
            1, high=high, low=low, partition=partition, tenant=tenant, rank=rank, head=NONE,
            tail=NONE,
            held=NONE, held_tail=NONE, num_waiting=0, num_pending=0, num_held=0, tokens=0,
            since=0.0,
            updated=-np.inf, is_hot=False, is_busy=False, is_candidate=False,
        )  # fmt: skip
        self.index.add(high, low, np.array([row]))
        return row

    def add(
        self, user: int, position: Position, state: EventState, tokens: int, arrived_at: float
    ) -> None:
        """Append an event to a user's chain; `arrived_at`: seconds since 1970, 0 when nobody
        knows."""
        event = (
            self._free.pop()
            if self._free
            else self.events.append(1, user=0, segment=0, row=0, next=0, tokens=0, state=0)
        )
        events, users = self.events, self.users
        events["user"][event], events["next"][event], events["state"][event] = user, NONE, state
        events["segment"][event], events["row"][event] = position
        events["tokens"][event] = tokens
        first, last = ("held", "held_tail") if state == EventState.HELD else ("head", "tail")
        if users[first][user] == NONE:
            users[first][user] = event
        else:
            events["next"][users[last][user]] = event
        users[last][user] = event
        if state == EventState.HELD:
            users["num_held"][user] += 1
            return
        if not users["num_waiting"][user]:
            # What isn't known is old; nobody waits from before this index, though, or waits would
            # look like decades.
            users["since"][user] = self._in_line(min(arrived_at, time.time()) or self._epoch)
        users["num_waiting"][user] += 1
        if not users["is_busy"][user] and not users["is_candidate"][user]:
            users["is_candidate"][user] = True
            self._joined.append(user)
        if state == EventState.PENDING:
            if users["num_pending"][user] < self.events_per_update:
                users["tokens"][user] += tokens
            users["num_pending"][user] += 1

    # Removing.

    def follow(self, record: Record) -> None:
        """Drop what a record accounts for."""
        match record:
            case WaveManifest():
                for entry in record.revisions:
                    self.consume(entry.pseudonym, entry.consumed)
            case Settled():
                self.consume(record.pseudonym, record.consumed)

    def consume(self, pseudonym: str, consumed: Position) -> None:
        """Everything of the user up to here is accounted for. Who has more gets in at the end of
        the line."""
        if (user := self.row_of(pseudonym)) is None:
            return
        users, events = self.users, self.events
        event, num_gone = int(users["head"][user]), 0
        while (
            event != NONE and (int(events["segment"][event]), int(events["row"][event])) <= consumed
        ):
            users["num_pending"][user] -= events["state"][event] == EventState.PENDING
            num_gone += 1
            following = int(events["next"][event])
            self._drop(event)
            event = following
        users["head"][user] = event
        users["num_waiting"][user] -= num_gone
        users["is_candidate"][user] &= event != NONE
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
        """Drop everything of a partition: another process has it, or it is about to be read
        anew."""
        rows = np.flatnonzero(
            (self.users["partition"] == partition)
            & ((self.users["num_waiting"] + self.users["num_held"]) > 0)
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
            if item.state == EventState.PENDING:
                if num_pending == limit:
                    break
                num_pending += 1
            found.append(item)
        return found

    def heldout(self, pseudonym: str) -> list[Position]:
        """A user's held-out events, oldest first."""
        user = self.row_of(pseudonym)
        return (
            []
            if user is None
            else [self._at(event).position for event in self._chain(int(self.users["held"][user]))]
        )

    def num_pending(self) -> int:
        return int(self.users["num_pending"].sum())

    def num_heldout(self) -> int:
        return int(self.users["num_held"].sum())

    def num_kept(self, partition: int) -> int:
        """Events of a partition that wait or are held out."""
        own = self.users["partition"] == partition
        return int((self.users["num_waiting"][own] + self.users["num_held"][own]).sum())

    def oldest_wait_s(self) -> float:
        """How long the user at the head of the line has waited; 0 without any."""
        waiting = self.users["num_waiting"] > 0
        return float(self.now() - self.users["since"][waiting].min()) if waiting.any() else 0.0

    def survivors(self, partition: int, floor: int) -> list[tuple[Position, int, int]]:
        """(position, state, tokens) of a partition's events below segment `floor` that wait or are
        held out, in the order of the log: what a snapshot has to keep."""
        events, users = self.events, self.users
        alive = np.flatnonzero(events["state"] > 0)
        is_own = users["partition"][events["user"][alive]] == partition
        alive = alive[is_own & (events["segment"][alive] < floor)]
        order = alive[np.lexsort((events["row"][alive], events["segment"][alive]))]
        columns = (events[name][order].tolist() for name in ("segment", "row", "state", "tokens"))
        return [
            ((segment, row), state, tokens)
            for segment, row, state, tokens in zip(*columns, strict=True)
        ]

    def candidates(self, load_bytes_per_rank: float = 0.0) -> Candidates:
        """Who may be in a wave, and what the scheduler has to know of them."""
        columns = {
            name: self.users[name]
            for name in ("since", "tokens", "tenant", "rank", "is_hot", "updated")
        }
        return Candidates(
            row_U=self._candidate_rows(),
            num_events=self.users["num_pending"],
            load_bytes_per_rank=load_bytes_per_rank,
            **columns,
        )

    def _candidate_rows(self) -> NDArray[np.int64]:
        """In order. Kept from call to call: looking through a million users takes longer than the
        rest of a wave."""
        is_candidate = self.users["is_candidate"]
        rows = self._candidates[is_candidate[self._candidates]]
        joined = np.unique(np.array(self._joined, np.int64))
        joined = joined[is_candidate[joined]]
        places = np.searchsorted(rows, joined)
        is_new = np.ones(len(joined), bool)
        inside = places < len(rows)
        is_new[inside] = rows[places[inside]] != joined[inside]
        self._candidates, self._joined = np.insert(rows, places[is_new], joined[is_new]), []
        return self._candidates

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
        rows = self._rows_mark("is_busy", pseudonyms, is_busy)
        self.users["is_candidate"][rows] = (self.users["num_waiting"][rows] > 0) & (not is_busy)
        self._joined += rows.tolist()

    def busy(self) -> list[str]:
        """Everybody in an uncommitted wave."""
        return [self.pseudonym(row) for row in np.flatnonzero(self.users["is_busy"]).tolist()]

    def mark_hot(self, pseudonyms: Sequence[str]) -> None:
        """Whose adapters the workers hold now; nobody else's."""
        self.users["is_hot"][:] = False
        self._rows_mark("is_hot", pseudonyms, True)

    def mark_rank(self, pseudonym: str, rank: int) -> None:
        """The user has an adapter of that rank now."""
        if (user := self.row_of(pseudonym)) is not None:
            self.users["rank"][user] = rank

    def _rows_mark(self, column: str, pseudonyms: Sequence[str], value: bool) -> NDArray[np.int64]:
        rows = self.index.find(*halves_of(pseudonyms)) if pseudonyms else np.zeros(0, np.int64)
        rows = rows[rows >= 0]
        self.users[column][rows] = value
        return rows

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
            if self.events["state"][item] == EventState.PENDING:
                tokens, num_events = tokens + int(self.events["tokens"][item]), num_events + 1
        return tokens

    def _at(self, event: int) -> EventAt:
        events = self.events
        position = (int(events["segment"][event]), int(events["row"][event]))
        return EventAt(position, EventState(int(events["state"][event])))

    def _drop(self, event: int) -> None:
        self.events["state"][event] = 0
        self._free.append(event)

    def _clear(self, user: int) -> None:
        users = self.users
        for first, last in (("head", "tail"), ("held", "held_tail")):
            for event in list(self._chain(int(users[first][user]))):
                self._drop(event)
            users[first][user] = users[last][user] = NONE
        for name in ("num_waiting", "num_pending", "num_held", "tokens", "is_candidate"):
            users[name][user] = 0
