"""A small population for tests of the store: its logs, its keys, and revisions of made-up bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.checkpoint import restore
from populace.storage.catalog.states import AdapterState
from populace.storage.keys.keyring import Keyring, PublicKey
from populace.storage.keys.user_keys import UserKeys
from populace.storage.log.loading import blob_context
from populace.storage.log.owner import NewRevision, Owner
from populace.storage.log.reader import RevisionLogReader
from populace.storage.log.records import AdapterCreated, EventRef, RevisionEntry, SettledEvent
from populace.storage.objects.contract import ObjectStore

FIXED: dict[str, Any] = {
    "parameters": {"algorithm": "grpo"},
    "materials": {"base": "b" * 64},
    "numerics": {"dtype": "float32"},
}


def name_of(user: str) -> str:
    """A pseudonym."""
    return hashlib.sha256(user.encode()).hexdigest()[:32]


def event(number: int) -> EventRef:
    return EventRef(tag=f"{number:032x}", position=(number, 0), digest="d" * 64)


def parent_sha256(catalog: Catalog, adapter: AdapterState) -> str | None:
    """What the next revision names as its parent's weights."""
    if not adapter.tip:
        return None
    return catalog.revision_of(adapter.pseudonym, adapter.tip).blobs["weights"].sha256


@dataclass
class History:
    """One population `pop` with one partition in `store`."""

    store: ObjectStore
    folder: Path
    keyring: Keyring = field(init=False)
    root_key: PublicKey = field(init=False)
    master: str = field(init=False)

    def __post_init__(self) -> None:
        self.keyring = Keyring(self.folder)
        self.root_key = self.keyring.new_signing_key()
        self.master = self.keyring.new_master_key()

    def keys(self) -> UserKeys:
        return UserKeys(self.store, "pop", self.keyring)

    def reader(self) -> RevisionLogReader:
        return RevisionLogReader(self.store, "pop", 0, self.root_key)

    def open(self, through: ObjectStore | None = None) -> tuple[RevisionLogReader, Catalog]:
        """Newest checkpoint plus tail, as any process opens a partition."""
        reader = RevisionLogReader(through or self.store, "pop", 0, self.root_key)
        catalog = Catalog()
        restore(reader, catalog)
        for header, record in reader.read_new():
            catalog.apply(header, record)
        return reader, catalog

    def claim(self, name: str = "me", through: ObjectStore | None = None) -> tuple[Owner, Catalog]:
        reader, catalog = self.open(through)
        owner = Owner(reader, name, self.keyring)
        catalog.owned[0] = True
        return owner, catalog

    def create(self, owner: Owner, catalog: Catalog, user: str) -> None:
        self.keys().ensure(name_of(user), user, lambda: self.master)
        record = AdapterCreated(pseudonym=name_of(user), spec={"rank": 4}, seed=7)
        catalog.apply(owner.append(record), record)

    def draft(
        self, catalog: Catalog, user: str, body: bytes = b"weights", at: int = 0
    ) -> NewRevision:
        """The next revision of `user`, sealed as the controller does it."""
        adapter, keys = catalog.require(name_of(user)), self.keys()
        revision = adapter.next_revision
        parts = {"weights": body, "moments": b"m" + body, "evidence": b"e" + body}
        entry = RevisionEntry(
            pseudonym=name_of(user),
            revision=revision,
            parent=adapter.tip,
            parent_sha256=parent_sha256(catalog, adapter),
            blobs={},
            experts=[0, 2],
            trained=[event(at or revision)],
            settled=[SettledEvent(event=event(90 + revision), reason="too long")],
            consumed=(at or revision, 0),
            metrics={"reward": 0.5},
        )
        return NewRevision(
            entry=entry,
            blobs={
                part: keys.seal(name_of(user), blob, blob_context(part, revision))
                for part, blob in parts.items()
            },
        )

    def commit(self, owner: Owner, catalog: Catalog, *users: str, body: bytes = b"weights") -> None:
        drafts = [self.draft(catalog, user, body) for user in users]
        catalog.apply(*owner.commit_wave("w", drafts, **FIXED))
