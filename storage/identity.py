"""What a population is: the object that is written once, when it is created."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from dataclasses import asdict, dataclass

from populace.storage import paths
from populace.storage.errors import AlreadyExists, Damaged, InvalidInput, ObjectNotFound
from populace.storage.keys.keyring import Keyring, PublicKey
from populace.storage.keys.secrets import Secrets
from populace.storage.objects.contract import ObjectStore

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PopulationMeta:
    """`population.json`: written once, when the population is created."""

    format: int
    name: str
    base: str
    base_digest: str
    partitions: int
    seed: int
    heldout_share: float
    root_key: PublicKey
    """Signed the first record of every log; `rotate` records hand over to later ones."""

    @staticmethod
    def create(
        store: ObjectStore,
        keyring: Keyring,
        *,
        name: str,
        base: str,
        base_digest: str,
        partitions: int,
        seed: int,
        heldout_share: float,
    ) -> PopulationMeta:
        """Write a new population and the keys that are its own; of two at once, one wins and both
        use it."""
        master = keyring.new_master_key()
        own_secrets = Secrets(master=master, pseudonym_key=secrets.token_hex(32))
        try:
            store.create(paths.secrets(name), own_secrets.wrap(name, keyring))
        except AlreadyExists:
            keyring.discard(master=master)
            Secrets.read(
                store, name, keyring
            )  # before anything rests on secrets that can't be read here
        root_key = keyring.new_signing_key()
        meta = PopulationMeta(
            format=FORMAT_VERSION,
            name=name,
            base=base,
            base_digest=base_digest,
            partitions=partitions,
            seed=seed,
            heldout_share=heldout_share,
            root_key=root_key,
        )
        try:
            store.create(
                paths.identity(name),
                json.dumps({**asdict(meta), "root_key": root_key.as_json()}, indent=1).encode(),
            )
        except AlreadyExists:
            keyring.discard(signing=root_key)
            return PopulationMeta.read(store, name)
        logger.warning(
            "the keys of population %r are in %s; back them up: nothing can be read without",
            name,
            keyring.folder,
        )
        return meta

    @staticmethod
    def read(store: ObjectStore, name: str) -> PopulationMeta:
        body = json.loads(store.get(paths.identity(name)))
        if body.get("format") != FORMAT_VERSION:
            raise InvalidInput(
                f"population {name!r} has format {body.get('format')}; this version reads "
                f"{FORMAT_VERSION}"
            )
        return PopulationMeta(**{**body, "root_key": PublicKey(public=body["root_key"]["public"])})

    @staticmethod
    def find(store: ObjectStore, name: str) -> PopulationMeta | None:
        try:
            return PopulationMeta.read(store, name)
        except ObjectNotFound:
            return None

    def heldout_key(self) -> bytes:
        """Fixed by name and seed, so that a population made again holds out the same tasks."""
        return hashlib.blake2b(f"heldout/{self.name}/{self.seed}".encode(), digest_size=32).digest()

    def adapter_seed(self, user: str) -> int:
        """63 bits; the seed of a user's initialisation and noise."""
        digest = hashlib.blake2b(f"{self.seed}/{user}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


def check_name(name: str) -> str:
    """A population's name is a folder name in the store."""
    if (
        not name
        or not all(char.isalnum() or char in "-_." for char in name)
        or name.startswith(".")
    ):
        raise InvalidInput(f"population name is {name!r}; use letters, digits, '-', '_' and '.'")
    return name


def verify_digest(meta: PopulationMeta, digest: str) -> None:
    if meta.base_digest != digest:
        raise Damaged(
            f"population {meta.name!r} lives on base {meta.base} with digest "
            f"{meta.base_digest[:16]}…, but the base "
            f"given has {digest[:16]}…; name the base that the population was created on"
        )
