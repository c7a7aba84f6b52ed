"""An event becomes an encrypted row of a segment, and back; and the names under which users and
events stand in the logs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass

from populace.population.experience.events import LogEvent, UserId, decode_event
from populace.population.experience.segments import Row
from populace.storage.keys.keyring import Keyring
from populace.storage.keys.secrets import Secrets
from populace.storage.keys.user_keys import UserKeys
from populace.storage.log.records import EventRef, Position, ReasonKind, SettledEvent
from populace.storage.objects.contract import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedEvent:
    """An event at its place in the log.

    Example: `LoggedEvent(user="ada", pseudonym="3f…", event=Task(…), ref=EventRef(…))`."""

    user: UserId
    pseudonym: str
    event: LogEvent
    ref: EventRef
    sequence: int | None = None
    """The event id, where it is an integer."""

    @property
    def event_id(self) -> str:
        return str(self.event.event_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why an event ends without being trained on, before it is sealed.

    Example: `Reason(kind=ReasonKind.STALE, text="stale: revision 2 is 9 updates old, at most 8")`.
    """

    text: str
    """Stands in the log for ever: nothing that the user or the user's code said."""
    said: str = ""
    """What they said; it is only stored sealed with the user's key."""
    kind: ReasonKind = ReasonKind.REJECTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """An event that ends without being trained on, and why."""

    logged: LoggedEvent
    reason: Reason


class Seals:
    """Turns events into rows that only holders of the keys can read, and back."""

    def __init__(self, keys: UserKeys, pseudonym_key: bytes) -> None:
        self.keys = keys
        self._key = pseudonym_key

    @staticmethod
    def of(store: ObjectStore, population: str, keyring: Keyring | None = None) -> Seals:
        """Those of a population; `InvalidInput` if its master key isn't here."""
        keyring = keyring or Keyring()
        secrets = Secrets.read(store, population, keyring)
        return Seals(UserKeys(store, population, keyring), bytes.fromhex(secrets.pseudonym_key))

    def pseudonym(self, user: str) -> str:
        """The name under which `user` stands in the logs: 128 bits of a keyed hash, hex."""
        return hmac.digest(self._key, user.encode(), "sha256").hex()[:32]

    def tag(self, pseudonym: str, event_id: str) -> str:
        """The name under which an event stands in the logs: 128 bits of a keyed hash, hex."""
        return hmac.digest(self._key, f"{pseudonym}/{event_id}".encode(), "sha256").hex()[:32]

    def mask_seed(self, pseudonym: str, seed: int) -> int:
        """Hides a seed in the log, and brings it back: seeds follow from user ids, and nobody
        without the secrets may test a guess at who somebody is."""
        digest = hmac.new(self._key, f"seed/{pseudonym}".encode(), hashlib.sha256).digest()
        return seed ^ (int.from_bytes(digest[:8], "big") >> 1)

    def seal(self, pseudonym: str, event_id: str, plain: bytes) -> Row:
        """A row of `SCHEMA` from an event's bytes (`event_bytes`); the user's key must be there."""
        tag = self.tag(pseudonym, event_id)
        sealed = self.keys.seal(pseudonym, plain, f"event/{tag}")
        return {"pseudonym": pseudonym, "tag": tag, "sealed": sealed}

    def open(self, row: Mapping[str, str | bytes], position: Position) -> LoggedEvent:
        """The event in a row; `Forgotten` when its user was erased."""
        pseudonym, tag, sealed = str(row["pseudonym"]), str(row["tag"]), row["sealed"]
        assert isinstance(sealed, bytes)
        plain = self.keys.open(pseudonym, sealed, f"event/{tag}")
        # Keyed, so that nobody without the key can test a guess at what the user said.
        digest = hmac.digest(self._key, plain, "sha256").hex()
        encoded = json.loads(plain)
        event_id = encoded["event_id"]
        return LoggedEvent(
            user=UserId(self.keys.get(pseudonym).user),
            pseudonym=pseudonym,
            event=decode_event(encoded),
            ref=EventRef(tag=tag, position=position, digest=digest),
            sequence=event_id if isinstance(event_id, int) else None,
        )

    def settled(self, item: Settlement) -> SettledEvent:
        """What the log says of an event that ends without being trained on."""
        logged, said = item.logged, item.reason.said.encode()
        context = f"detail/{logged.ref.tag}"
        detail = self.keys.seal(logged.pseudonym, said, context) if said else b""
        return SettledEvent(
            event=logged.ref, reason=item.reason.text, detail=base64.b64encode(detail).decode()
        )

    def detail(self, pseudonym: str, settled: SettledEvent) -> str:
        """What was said, as `settled` sealed it."""
        sealed = base64.b64decode(settled.detail)
        if not sealed:
            return ""
        return self.keys.open(pseudonym, sealed, f"detail/{settled.event.tag}").decode()
