"""Makes a golden store: `python -m tests.support.golden_store FOLDER`. Once a format is released
its folder is never made again."""

from __future__ import annotations

import sys
from pathlib import Path

from populace.population.experience.checks import CheckedEvent
from populace.population.experience.events import Demonstration, Forget, Task
from populace.population.experience.producer import Producer
from populace.population.experience.sealing import Reason, Seals, Settlement
from populace.population.ledger.commands import obey_commands
from populace.population.ledger.ledger import Ledger
from populace.population.ledger.ownership import Ownership
from populace.population.ledger.upkeep import Upkeep
from populace.storage.catalog.repack import RetentionRule
from populace.storage.identity import PopulationMeta
from populace.storage.keys.keyring import Keyring
from populace.storage.log.loading import blob_context
from populace.storage.log.owner import NewRevision
from populace.storage.log.records import (
    AdapterCreated,
    Attempt,
    Decision,
    Failed,
    RevisionEntry,
    Rotate,
    Settled,
    Verdict,
)
from populace.storage.objects.files import FileStore
from tests.support.history import parent_sha256

USERS = ("ada", "bob", "cleo")


def make(folder: Path) -> None:
    """A population with a record of every kind in it, without a model."""
    keyring = Keyring(folder / "keys")
    meta = PopulationMeta.create(
        FileStore(folder / "store"), keyring, name="golden", base="tiny", base_digest="b" * 64,
        partitions=1, seed=7,
        heldout_share=0.0,
    )  # fmt: skip
    store = FileStore(folder / "store")
    seals = Seals.of(store, meta.name, keyring)
    ledger = Ledger(store, meta, seals)
    ownership, upkeep = Ownership(ledger), Upkeep(ledger)
    producer = Producer(store, meta, keyring)
    lesson = Demonstration(prompt="rain", completion="sea", event_id="1")
    producer.enqueue_many((user, [lesson]) for user in USERS)
    producer.enqueue("bob", [Task(prompt="rain", reward="letters", event_id="2")])
    ownership.claim(0.01)
    ledger.read_experience()
    names = {user: ledger.pseudonym(user) for user in USERS}
    waiting = {
        user: ledger.events(0, [item.position for item in ledger.pending.waiting(name)])
        for user, name in names.items()
    }
    spec = {
        "rank": 4,
        "expert_rank": 1,
        "alpha": 32.0,
        "learning_rate": 0.001,
        "b_learning_rate_ratio": 1.0,
    }
    created = [
        AdapterCreated(pseudonym=name, spec=spec, seed=seals.mask_seed(name, 7))
        for name in names.values()
    ]
    tried = {names[user]: [item.ref for item in waiting[user]] for user in USERS}
    ledger.append_all([(0, record) for record in created])
    ledger.append(0, Attempt(wave="w1", num_adapters=3, adapters=tried))
    for turn in range(5):
        drafts = []
        for user in USERS[: 3 if turn == 0 else 1]:
            adapter = ledger.catalog.require(names[user])
            number, first = adapter.next_revision, waiting[user][0].ref
            blobs = {
                part: ledger.keys.seal(
                    names[user], f"{part} {user} {number}".encode(), blob_context(part, number)
                )
                for part in ("weights", "moments", "evidence")
            }
            entry = RevisionEntry(
                pseudonym=names[user],
                revision=number,
                parent=adapter.tip,
                parent_sha256=parent_sha256(ledger.catalog, adapter),
                blobs={},
                experts=[0, 3],
                trained=[first] if turn == 0 else [],
                settled=[],
                consumed=first.position,
                metrics={"reward": 0.5},
            )
            drafts.append(NewRevision(entry=entry, blobs=blobs))
        owner = ledger.owners[0]
        ledger.catalog.apply(
            *owner.commit_wave(
                "w1", drafts, parameters={}, materials={"base": "b" * 64}, numerics={}
            )
        )
    bob = waiting["bob"][1]
    ledger.append(
        0, Failed(pseudonym=names["bob"], event=bob.ref, reason="reward letters raised ValueError")
    )
    reason = Reason(text="reward letters raised ValueError", said="something that bob said")
    settled = seals.settled(Settlement(logged=bob, reason=reason))
    ledger.append(0, Settled(pseudonym=names["bob"], events=[settled], consumed=bob.ref.position))
    ledger.append(
        0,
        Verdict(
            pseudonym=names["bob"],
            decision=Decision.PROMOTE,
            judged=1,
            tip=1,
            serving=1,
            reason="r",
        ),
    )
    ledger.append(0, Rotate(key=keyring.new_signing_key().as_json()))
    producer.send({"cleo": [CheckedEvent.of(Forget())]})
    ledger.read_experience()
    obey_commands(ledger)
    upkeep.repack(RetentionRule(last=2))
    upkeep.compact(1)
    upkeep.checkpoint(1)
    ledger.append(
        0,
        Verdict(
            pseudonym=names["ada"], decision=Decision.REJECT, judged=5, tip=0, serving=0, reason="r"
        ),
    )
    ownership.release()
    upkeep.close()
    producer.close()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
