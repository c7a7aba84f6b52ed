"""Makes a golden store: `python -m tests.golden FOLDER`. Once a format is released its folder is
never made again."""

from __future__ import annotations

import sys
from pathlib import Path

from populace.population.experience.events import Demonstration, Forget, Task
from populace.population.ledger.ledger import Ledger
from populace.storage.catalog.repack import RetentionRule
from populace.storage.identity import PopulationMeta
from populace.storage.keys.keyring import Keyring
from populace.storage.log.loading import blob_context
from populace.storage.log.owner import RevisionDraft
from populace.storage.log.records import (
    AdapterCreated,
    Attempt,
    Failed,
    Rotate,
    Settled,
    SettledEvent,
    Verdict,
)
from populace.storage.objects.files import FileStore

USERS = ("ada", "bob", "cleo")


def make(folder: Path) -> None:
    """A population with a record of every kind in it, without a model."""
    keyring = Keyring(folder / "keys")
    meta = PopulationMeta.create(
        FileStore(folder / "store"), keyring, name="golden", base="tiny", base_digest="b" * 64,
        partitions=1, seed=7,
        heldout_share=0.0,
    )  # fmt: skip
    ledger = Ledger(FileStore(folder / "store"), meta, keyring)
    ledger.enqueue(
        {user: [Demonstration(prompt="rain", completion="sea", event_id="1")] for user in USERS}
    )
    ledger.enqueue({"bob": [Task(prompt="rain", reward="letters", event_id="2")]})
    ledger.claim(0.01)
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
        AdapterCreated(pseudonym=name, spec=spec, seed=ledger.mask_seed(name, 7))
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
            drafts.append(
                RevisionDraft(
                    pseudonym=names[user], revision=number, parent=adapter.tip,
                    parent_sha256=ledger.catalog.revision_of(adapter.pseudonym, adapter.tip).blobs["weights"].sha256
                    if adapter.tip else None,
                    blobs=blobs,
                    experts=[0, 3], trained=[first] if turn == 0 else [], settled=[],
                    consumed=first.position,
                    metrics={"reward": 0.5},
                )
            )  # fmt: skip
        owner = ledger.owner(0)
        ledger.catalog.apply(
            *owner.commit_wave(
                "w1", drafts, parameters={}, materials={"base": "b" * 64}, numerics={}
            )
        )
    bob = waiting["bob"][1]
    ledger.append(
        0, Failed(pseudonym=names["bob"], event=bob.ref, reason="reward letters raised ValueError")
    )
    settled: SettledEvent = ledger.seals.settled(
        bob, "reward letters raised ValueError\nsomething that bob said"
    )
    ledger.append(0, Settled(pseudonym=names["bob"], events=[settled], consumed=bob.ref.position))
    ledger.append(
        0,
        Verdict(pseudonym=names["bob"], decision="promote", judged=1, tip=1, serving=1, reason="r"),
    )
    ledger.append(0, Rotate(key=keyring.new_signing_key().as_json()))
    ledger.enqueue({"cleo": [Forget()]})
    ledger.read_experience()
    ledger.obey_commands()
    ledger.repack(RetentionRule(last=2))
    ledger.compact(1)
    ledger.checkpoint(1)
    ledger.append(
        0,
        Verdict(pseudonym=names["ada"], decision="reject", judged=5, tip=0, serving=0, reason="r"),
    )
    ledger.release()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
