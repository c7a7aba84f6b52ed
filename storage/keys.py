"""Keys: who may write a population's history, and who can read its users.

    signing key   signs every record; its public half stands in population.json, `rotate` records hand it on
    master key    wraps the population's secrets and one data key per user
    data key      encrypts everything of one user; overwriting its object with a marker forgets the user

Signing and master keys stay with the operator, in a folder or in the environment, never in the store.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, SSlibKey

from populace.storage.errors import AlreadyExists, Damaged, Forgotten, InvalidInput, ObjectNotFound, OutcomeUnknown
from populace.storage.log import Log
from populace.storage.objects import ObjectStore, sync_folder

NONCE_BYTES = 12
OVERHEAD_BYTES = NONCE_BYTES + 16
"""What sealing adds: nonce in front, authentication tag behind (NIST SP 800-38D)."""
_MAX_CACHED = 1 << 16
_UNOPENED = "{} does not decrypt: its bytes or its key were changed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """The public half of an Ed25519 signing key."""

    public: str
    """Hex."""

    @property
    def keyid(self) -> str:
        """sha256 of the key itself: whoever pins the id has pinned the key."""
        return hashlib.sha256(bytes.fromhex(self.public)).hexdigest()

    def as_json(self) -> dict[str, str]:
        return {"keyid": self.keyid, "public": self.public}

    def as_key(self) -> SSlibKey:
        return SSlibKey(self.keyid, "ed25519", "ed25519", {"public": self.public})


class Keyring:
    """This process's signing and master keys: $POPULACE_SIGNING_KEY (PEM) and $POPULACE_MASTER_KEY (NAME:HEX),
    then the files in $POPULACE_KEYS, by default ~/.config/populace/keys."""

    def __init__(self, folder: Path | None = None) -> None:
        default = Path.home() / ".config" / "populace" / "keys"
        self.folder = folder or Path(os.environ.get("POPULACE_KEYS") or default)

    def new_signing_key(self) -> PublicKey:
        signer = CryptoSigner.generate_ed25519()
        key = public_of(signer)
        self._write(f"signing-{key.keyid[:16]}.pem", signer.private_bytes)
        return key

    def signer(self, key: PublicKey) -> CryptoSigner:
        """The private half of `key`; `InvalidInput` says where it was looked for."""
        path = self.folder / f"signing-{key.keyid[:16]}.pem"
        for pem in (os.environ.get("POPULACE_SIGNING_KEY", "").encode(), _read(path)):
            if not pem:
                continue
            try:
                private = load_pem_private_key(pem, None)
                if public_of(CryptoSigner(private)) == key:
                    return CryptoSigner(private, key.as_key())
            except (ValueError, TypeError) as error:
                raise InvalidInput(f"$POPULACE_SIGNING_KEY or {path} holds no PEM private key: {error}") from None
        raise InvalidInput(
            f"the signing key {key.keyid[:16]} of this population is neither in $POPULACE_SIGNING_KEY nor in {path}; "
            "copy it there from where the population was created"
        )

    def new_master_key(self) -> str:
        """Make a master key; returns its name."""
        name = secrets.token_hex(8)
        self._write(f"master-{name}.key", secrets.token_hex(32).encode())
        return name

    def master_key(self, name: str) -> bytes:
        path = self.folder / f"master-{name}.key"
        given, _, value = os.environ.get("POPULACE_MASTER_KEY", "").partition(":")
        text = value if given == name else _read(path).decode()
        if not text:
            raise InvalidInput(
                f"the master key {name!r} of this population is neither in $POPULACE_MASTER_KEY nor in {path}; copy it "
                "there from where the population was created: without it no user's data can be read"
            )
        try:
            key = bytes.fromhex(text.strip())
        except ValueError:
            key = b""
        if len(key) != 32:
            raise InvalidInput(f"master key {name!r} is not 64 hexadecimal digits; restore it from a copy")
        return key

    def discard(self, *, signing: PublicKey | None = None, master: str | None = None) -> None:
        """Remove keys that protect nothing."""
        if signing is not None:
            (self.folder / f"signing-{signing.keyid[:16]}.pem").unlink(missing_ok=True)
        if master is not None:
            (self.folder / f"master-{master}.key").unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserKey:
    """Whose key it is, and the key."""

    user: str
    key: bytes
    wrapped: bytes = field(default=b"", compare=False, repr=False)
    """As it lies in the store: equal bytes need no second unwrapping."""
    era: int = field(default=-1, compare=False, repr=False)
    """The one in which it was read from the store."""


class UserKeys:
    """One wrapped data key per user, at `<population>/keys/<aa>/<pseudonym>`.

    Every forgetting begins new eras, at `<population>/eras/<number>`: a key that was read in the era that still lasts
    need not be read again to know that its user wasn't forgotten. They are created, never overwritten: no late write
    brings an old one back."""

    def __init__(self, store: ObjectStore, population: str, keyring: Keyring) -> None:
        self.store, self.population, self.keyring = store, population, keyring
        self._cache: OrderedDict[str, UserKey] = OrderedDict()
        self._lock = threading.Lock()  # loads run in several threads
        self._masters: dict[str, bytes] = {}
        self._eras = Log(store, f"{population}/eras", "")
        self._era: int | None = None
        """As last read; None: never."""

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
        body = _parse(wrapped, self._path(pseudonym))
        if body.get("forgotten"):
            raise Forgotten("this user was forgotten; nothing of theirs can be read or written again")
        plain = json.loads(self._unwrap(body, pseudonym))
        found = UserKey(user=plain["user"], key=bytes.fromhex(plain["key"]), wrapped=wrapped, era=era)
        with self._lock:
            self._cache[pseudonym] = found
            if len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
        return found

    def ensure(self, pseudonym: str, user: str, master: Callable[[], str]) -> UserKey:
        """The user's key, made now if there is none; racing producers agree on one. For writing: asks the store unless
        the key is of the era last seen. `outdated`, when the writing is done, tells of a forgetting meanwhile."""
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
        """Those of whom it isn't certain that their keys are still there; one request, however many they are."""
        era = self._read_era()
        with self._lock:
            known = [(pseudonym, self._cache.get(pseudonym)) for pseudonym in pseudonyms]
        return [pseudonym for pseudonym, key in known if key is None or key.era < era]

    def forget(self, pseudonym: str) -> None:
        """Overwrite the key. From here on nobody can read what it encrypted."""
        # An era before and one behind: should this process die in between, only who read the key in that moment has one
        # of an era that lasts, until the next owner begins another.
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
            with contextlib.suppress(AlreadyExists):  # that one may be from before what this one tells of
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
        """Wrap with another master key. Only the partition's owner may: a racing `forget` must not be undone."""
        body = _parse(self.store.get(self._path(pseudonym)), self._path(pseudonym))
        if body.get("forgotten") or body["master"] == master:
            return
        self.store.put(self._path(pseudonym), self._wrap(self.fetch(pseudonym), pseudonym, master))

    def pseudonyms(self) -> list[str]:
        """Everyone who has or had a key."""
        keys = self.store.list(f"{self.population}/keys")
        return [name for name in (key.rpartition("/")[2] for key in keys) if name != SECRETS]

    def seal(self, pseudonym: str, plain: bytes, context: str) -> bytes:
        """Encrypt for a user. `context` says what it is; only the same context opens it."""
        return seal(self.get(pseudonym).key, plain, self._context(pseudonym, context))

    def open(self, pseudonym: str, sealed: bytes, context: str) -> bytes:
        return unseal(self.get(pseudonym).key, sealed, self._context(pseudonym, context))

    def open_into(self, pseudonym: str, sealed: memoryview, context: str, into: memoryview) -> None:
        """`open`, straight into memory that is there: `OVERHEAD_BYTES` less than `sealed`."""
        whole, nonce = self._context(pseudonym, context), bytes(sealed[:NONCE_BYTES])
        try:
            AESGCM(self.get(pseudonym).key).decrypt_into(nonce, sealed[NONCE_BYTES:], whole.encode(), into)
        except InvalidTag:
            raise Damaged(_UNOPENED.format(whole)) from None

    def _context(self, pseudonym: str, context: str) -> str:
        return f"{self.population}/{pseudonym}/{context}"

    def _read_era(self) -> int:
        era = self._eras.next_after(self._era or 0)
        self._era = max(era, self._era or 0)
        return era

    def _path(self, pseudonym: str) -> str:
        return f"{self.population}/keys/{pseudonym[:2]}/{pseudonym}"

    def _wrap(self, key: UserKey, pseudonym: str, master: str) -> bytes:
        plain = json.dumps({"user": key.user, "key": key.key.hex()}).encode()
        sealed = seal(self._master(master), plain, f"{self.population}/{pseudonym}")
        return json.dumps({"master": master, "sealed": base64.b64encode(sealed).decode()}).encode()

    def _unwrap(self, body: dict[str, str], pseudonym: str) -> bytes:
        return unseal(self._master(body["master"]), base64.b64decode(body["sealed"]), f"{self.population}/{pseudonym}")

    def _master(self, name: str) -> bytes:
        if name not in self._masters:
            self._masters[name] = self.keyring.master_key(name)
        return self._masters[name]


SECRETS = "population"


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """What only holders of the master key may know of a population."""

    master: str
    """Name of the key that wraps this, and new users' keys."""
    pseudonym_key: str
    """Hex. Keys the pseudonyms and event tags that stand in the logs."""

    @staticmethod
    def path(population: str) -> str:
        return f"{population}/keys/{SECRETS}"

    def wrap(self, population: str, keyring: Keyring) -> bytes:
        sealed = seal(keyring.master_key(self.master), bytes.fromhex(self.pseudonym_key), f"{population}/secrets")
        return json.dumps({"master": self.master, "sealed": base64.b64encode(sealed).decode()}).encode()

    @staticmethod
    def read(store: ObjectStore, population: str, keyring: Keyring) -> Secrets:
        path = Secrets.path(population)
        body = _parse(store.get(path), path)
        sealed = base64.b64decode(body["sealed"])
        plain = unseal(keyring.master_key(body["master"]), sealed, f"{population}/secrets")
        return Secrets(master=body["master"], pseudonym_key=plain.hex())


def seal(key: bytes, plain: bytes, context: str) -> bytes:
    """AES-256-GCM with a random nonce: nonce, ciphertext, tag."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, context.encode())


def unseal(key: bytes, sealed: bytes, context: str) -> bytes:
    """Raises `Damaged` if these bytes were not sealed with this key for this context."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context.encode())
    except (InvalidTag, ValueError):
        raise Damaged(_UNOPENED.format(context)) from None


def public_of(signer: CryptoSigner) -> PublicKey:
    return PublicKey(public=signer.public_key.keyval["public"])


def _parse(body: bytes, path: str) -> dict[str, str]:
    try:
        parsed: dict[str, str] = json.loads(body)
        if not (parsed.get("forgotten") or (parsed["master"] and base64.b64decode(parsed["sealed"]))):
            raise ValueError("neither a key nor a marker")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is not a wrapped key: {error}; restore it from a copy") from error
    return parsed


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InvalidInput(f"{path} can't be read: {error}; $POPULACE_KEYS must name a folder") from None
