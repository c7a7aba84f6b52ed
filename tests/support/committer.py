"""A process that commits without end, to be killed. Says in a journal what it tries and what it was
told."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

from populace.population.experience.log import ExperienceLog
from populace.storage.catalog.checkpoint import write_checkpoint
from populace.storage.catalog.repack import RetentionRule, repack
from populace.storage.objects.open import open_store
from tests.support.history import FIXED, History, name_of

USERS = tuple(f"user-{number}" for number in range(8))


def open_history(url: str, folder: Path) -> History:
    """The history that the test made, from another process."""
    history = object.__new__(History)
    history.store, history.folder = open_store(url), folder
    from populace.storage.keys.keyring import Keyring

    history.keyring = Keyring(folder)
    (signing,) = folder.glob("signing-*.pem")
    (master,) = folder.glob("master-*.key")
    history.master = master.stem.removeprefix("master-")
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    from populace.storage.keys.keyring import public_of

    history.root_key = public_of(CryptoSigner(load_pem_private_key(signing.read_bytes(), None)))
    return history


def commit_for_ever(
    url: str, folder: Path, journal: Path, life: int, environment: dict[str, str]
) -> None:
    """Claim, then waves, checkpoints, repacks and enqueues in turn. `environment`: the server that
    started this process may be older than the store's credentials."""
    os.environ.update(environment)
    history, chance = open_history(url, folder), random.Random(life)
    with open(journal, "a", buffering=1) as said:
        said.write(f"start {os.getpid()}\n")
        owner, catalog = history.claim(f"life {life}")
        experience = ExperienceLog(history.store, "pop", 0)
        for number in itertools.count():
            wave = f"wave-{life}-{number}"
            users = chance.sample(USERS, chance.randint(1, len(USERS)))
            body = wave.encode() + b"-" * chance.randint(0, 60_000)
            drafts = [history.draft(catalog, user, body) for user in users]
            said.write(f"try {wave}\n")
            catalog.apply(*owner.commit_wave(wave, drafts, **FIXED))
            said.write(f"done {wave}\n")
            event = f"event-{life}-{number}"
            experience.append([{"pseudonym": name_of(users[0]), "tag": event, "sealed": b"sealed"}])
            said.write(f"sent {event}\n")
            if number % 5 == 4:
                write_checkpoint(owner, catalog)
            if number % 7 == 6:
                repack(owner, catalog, RetentionRule(last=2))
