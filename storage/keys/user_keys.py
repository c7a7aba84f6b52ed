"""Keys: who may write a population's history, and who can read its users.

    signing key   signs every record; its public half stands in population.json, and `rotate`
                  records hand it on
    master key    wraps the population's secrets and one data key per user
    data key      encrypts everything of one user; overwriting its object with a marker erases the
                  user

Signing and master keys stay with the operator, in a folder or in the environment, never in the
store.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from populace.storage import paths
from populace.storage.errors import (
    AlreadyExists,
    Damaged,
    Forgotten,
    ObjectNotFound,
    OutcomeUnknown,
)
from populace.storage.keys.keyring import Keyring
from populace.storage.keys.sealing import NONCE_BYTES, UNOPENED, seal, unseal
from populace.storage.keys.secrets import parse_wrapped
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.log import Log

_MAX_CACHED = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class UserKey:
    """Whose key it is, and the key."""

    user: str
    key: bytes
    wrapped: bytes = field(default=b"", compare=False, repr=False)
    """The key as it lies in the store: equal bytes need no second unwrapping."""
    era: int = field(default=-1, compare=False, repr=False)
    """Era in which it was read from the store."""


class UserKeys:
    """One wrapped data key per user, at `<population>/keys/<aa>/<pseudonym>`.

    Erasing a user starts a new *era*, a numbered object at `<population>/eras/<number>` that is
    never overwritten. A key fetched in the current era has not been erased since, so producers
    compare eras instead of fetching keys again."""

    def __init__(self, store: ObjectStore, population: str, keyring: Keyring) -> None:
        self.store, self.population, self.keyring = store, population, keyring
        self._cache: OrderedDict[str, UserKey] = OrderedDict()
        self._lock = threading.Lock()  # loads run in several threads
        self._masters: dict[str, bytes] = {}
        self._eras = Log(store, paths.era_folder(population), "")
        self._era: int | None = None
        """The current era when it was last read; None: never."""

    def get(self, pseudonym: str) -> UserKey:
        """The key as last seen; `Forgotten` if the user was. For reading what is there."""
        with self._lock:
            if (found := self._cache.get(pseudonym)) is not None:
                self._cache.move_to_end(pseudonym)
                return found
        return self.fetch(pseudonym)

    def fetch(self, pseudonym: str) -> UserKey:
        """The key as the store has it now. `ObjectNotFound` if there is none."""
        era = self._era if self._era is not None else self._read_era()
        try:
            wrapped = self.store.get(self._path(pseudonym))
        except BaseException:
            self.drop([pseudonym])
            raise
        with self._lock:
            if (known := self._cache.get(pseudonym)) is not None and known.wrapped == wrapped:
                self._cache[pseudonym] = known = replace(known, era=era)
                return known
        self.drop([pseudonym])
        body = parse_wrapped(wrapped, self._path(pseudonym))
        if body.get("forgotten"):
            raise Forgotten(
                "this user was forgotten; nothing of theirs can be read or written again"
            )
        plain = json.loads(self._unwrap(body, pseudonym))
        found = UserKey(
            user=plain["user"], key=bytes.fromhex(plain["key"]), wrapped=wrapped, era=era
        )
        with self._lock:
            self._cache[pseudonym] = found
            if len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
        return found

    def ensure(self, pseudonym: str, user: str, master: Callable[[], str]) -> UserKey:
        """The user's key, made now if there is none; racing producers agree on one. For writing:
        asks the store unless the key is of the era last seen. `outdated`, when the writing is done,
        tells of an erasure meanwhile."""
        with self._lock:
            if (known := self._cache.get(pseudonym)) is not None and known.era == self._era:
                self._cache.move_to_end(pseudonym)
                return known
        for _ in range(4):
            with contextlib.suppress(ObjectNotFound):
                return self.fetch(pseudonym)
            made = UserKey(user=user, key=AESGCM.generate_key(256))
            # Whatever became of ours, the key that is there then is the user's.
            used = master()
            with contextlib.suppress(AlreadyExists, OutcomeUnknown):
                self.store.create(self._path(pseudonym), self._wrap(made, pseudonym, used))
            if (now := master()) != used:  # a rotation went by; it may have missed this key
                self.rewrap(pseudonym, now)
        return self.fetch(pseudonym)

    def outdated(self, pseudonyms: Iterable[str]) -> list[str]:
        """Those of whom it isn't certain that their keys are still there; one request, however many
        they are."""
        era = self._read_era()
        with self._lock:
            known = [(pseudonym, self._cache.get(pseudonym)) for pseudonym in pseudonyms]
        return [pseudonym for pseudonym, key in known if key is None or key.era < era]

    def forget(self, pseudonym: str) -> None:
        """Overwrite the key. From here on nobody can read what it encrypted."""
        # An era before and one behind: should this process die in between, only who read the key in
        # that moment has one of an era that lasts, until the next owner begins another.
        self.begin_era()
        # The nonce keeps this body unlike any other: an ETag of equal bodies would be equal too.
        marker = {"forgotten": True, "nonce": secrets.token_hex(8)}
        self.store.put(self._path(pseudonym), json.dumps(marker).encode())
        self.drop([pseudonym])
        self.begin_era()

    def begin_era(self) -> None:
        """Let everybody who writes ask for keys again: somebody is being forgotten."""
        era = self._era or 0
        while True:
            era = self._eras.next_after(era)
            with contextlib.suppress(
                AlreadyExists
            ):  # that one may be from before what this one tells of
                self._eras.append_at(era, b"era")
                return

    def drop(self, pseudonyms: Iterable[str]) -> None:
        """Take keys out of the memory of this process."""
        with self._lock:
            for pseudonym in pseudonyms:
                self._cache.pop(pseudonym, None)

    def is_forgotten(self, pseudonym: str) -> bool:
        try:
            self.fetch(pseudonym)
        except Forgotten:
            return True
        except ObjectNotFound:
            return False
        return False

    def rewrap(self, pseudonym: str, master: str) -> None:
        """Wrap with another master key. Only the partition's owner may: a racing `forget` must not
        be undone."""
        body = parse_wrapped(self.store.get(self._path(pseudonym)), self._path(pseudonym))
        if body.get("forgotten") or body["master"] == master:
            return
        self.store.put(self._path(pseudonym), self._wrap(self.fetch(pseudonym), pseudonym, master))

    def pseudonyms(self) -> list[str]:
        """Everyone who has or had a key."""
        keys = self.store.list(paths.key_folder(self.population))
        return [name for name in (key.rpartition("/")[2] for key in keys) if name != paths.SECRETS]

    def seal(self, pseudonym: str, plain: bytes, context: str) -> bytes:
        """Encrypt for a user. `context` says what it is; only the same context opens it."""
        return seal(self.get(pseudonym).key, plain, self._context(pseudonym, context))

    def open(self, pseudonym: str, sealed: bytes, context: str) -> bytes:
        return unseal(self.get(pseudonym).key, sealed, self._context(pseudonym, context))

    def open_into(self, pseudonym: str, sealed: memoryview, context: str, into: memoryview) -> None:
        """`open`, straight into memory that is there: `OVERHEAD_BYTES` less than `sealed`."""
        whole, nonce = self._context(pseudonym, context), bytes(sealed[:NONCE_BYTES])
        try:
            AESGCM(self.get(pseudonym).key).decrypt_into(
                nonce, sealed[NONCE_BYTES:], whole.encode(), into
            )
        except InvalidTag:
            raise Damaged(UNOPENED.format(whole)) from None

    def _context(self, pseudonym: str, context: str) -> str:
        return f"{self.population}/{pseudonym}/{context}"

    def _read_era(self) -> int:
        era = self._eras.next_after(self._era or 0)
        self._era = max(era, self._era or 0)
        return era

    def _path(self, pseudonym: str) -> str:
        return paths.user_key(self.population, pseudonym)

    def _wrap(self, key: UserKey, pseudonym: str, master: str) -> bytes:
        plain = json.dumps({"user": key.user, "key": key.key.hex()}).encode()
        sealed = seal(self._master(master), plain, f"{self.population}/{pseudonym}")
        return json.dumps({"master": master, "sealed": base64.b64encode(sealed).decode()}).encode()

    def _unwrap(self, body: dict[str, str], pseudonym: str) -> bytes:
        return unseal(
            self._master(body["master"]),
            base64.b64decode(body["sealed"]),
            f"{self.population}/{pseudonym}",
        )

    def _master(self, name: str) -> bytes:
        if name not in self._masters:
            self._masters[name] = self.keyring.master_key(name)
        return self._masters[name]
