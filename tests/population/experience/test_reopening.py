"""Enqueue, consume, compact and reopen in any order: whoever opens the population finds what a list
per user would hold."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run

from populace.population.experience.events import Demonstration
from populace.population.experience.pending import EventState
from populace.population.experience.producer import Producer
from populace.population.ledger.ledger import Ledger
from populace.population.ledger.ownership import Ownership
from populace.storage.log.records import AdapterCreated, Settled, SettledEvent
from populace.storage.objects.cloud import MemoryStore
from tests.support.loops import ledger_of, owned_ledger
from tests.support.streams import make_population

users = st.sampled_from(("ada", "bob"))
numbers = st.lists(st.integers(0, 5), min_size=1, max_size=3)


class Reopening(RuleBasedStateMachine):
    """The model: a user's ids in the order of their arrival, and which are accounted for."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.meta = make_population(self.store, partitions=1)
        self.producer = Producer(self.store, self.meta)
        self.sent: dict[str, list[str]] = {}
        self.consumed: dict[str, int] = {}
        self.ledger: Ledger
        self.ownership: Ownership

    @initialize()
    def start(self) -> None:
        self.ledger, self.ownership = owned_ledger(self.store, self.meta, 0.001)

    @rule(user=users, ids=numbers)
    def enqueue(self, user: str, ids: list[int]) -> None:
        """Ids may repeat, within a call and over calls: the content follows from the id."""
        events = [Demonstration(prompt="a", completion=f"{n}", event_id=f"e{n}") for n in ids]
        self.producer.enqueue(user, events)
        known = self.sent.setdefault(user, [])
        known += [name for name in dict.fromkeys(f"e{n}" for n in ids) if name not in known]

    @rule()
    def read(self) -> None:
        self.ledger.read_experience()

    @rule(user=users, count=st.integers(1, 3))
    def settle(self, user: str, count: int) -> None:
        """The next events of a user are accounted for."""
        pseudonym = self.ledger.pseudonym(user)
        places = [item.position for item in self.ledger.pending.waiting(pseudonym)][:count]
        events = self.ledger.events(0, places)
        if not events:
            return
        if pseudonym not in self.ledger.catalog:
            created = AdapterCreated(pseudonym=pseudonym, spec={"rank": 4}, seed=1)
            self.ledger.append(0, created)
        self.ledger.append(
            0,
            Settled(
                pseudonym=pseudonym,
                events=[SettledEvent(event=logged.ref, reason="no signal") for logged in events],
                consumed=places[-1],
            ),
        )
        self.consumed[user] = self.consumed.get(user, 0) + len(events)

    @rule()
    def compact(self) -> None:
        """What is consumed is cut off behind a snapshot."""
        consumer = self.ledger.consumers[0]
        self.ledger.read_experience()
        if consumer.next_segment > (
            self.ledger.catalog.compactions[0].floor if self.ledger.catalog.compactions else 0
        ):
            compaction = consumer.write_snapshot(self.ledger.catalog)
            self.ledger.append(0, compaction)
            consumer.finish_compaction(compaction)

    @rule()
    def reopen(self) -> None:
        """Another process takes over."""
        self.ownership.release()
        self.ledger, self.ownership = owned_ledger(self.store, self.meta, 0.001)

    @invariant()
    def everybody_finds_the_model(self) -> None:
        self.ledger.read_experience()
        reader = ledger_of(self.store, self.meta)
        reader.refresh()
        for ledger in (self.ledger, reader):
            for user, sent in self.sent.items():
                waiting = ledger.pending.waiting(ledger.pseudonym(user))
                assert all(item.state is EventState.PENDING for item in waiting)
                events = ledger.events(0, [item.position for item in waiting])
                assert [item.event_id for item in events] == sent[self.consumed.get(user, 0) :]
            total = sum(map(len, self.sent.values())) - sum(self.consumed.values())
            assert ledger.pending.num_pending() == total

    def teardown(self) -> None:
        self.ownership.release()
        self.producer.close()


def test_who_opens_a_population_finds_what_a_list_per_user_would_hold() -> None:
    run(
        Reopening,
        settings=hypothesis.settings(max_examples=40, stateful_step_count=20, deadline=None),
    )
