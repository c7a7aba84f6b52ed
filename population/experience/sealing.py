"""An event becomes an encrypted row of a segment, and back."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass

from populace.population.experience.events import LogEvent, UserId, decode_event
from populace.population.experience.segments import Row
from populace.storage.keys.user_keys import UserKeys
from populace.storage.log.records import EventRef, SettledEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedEvent:
    """An event at its place in the log."""

    user: UserId
    pseudonym: str
    event: LogEvent
    ref: EventRef
    sequence: int | None = None
    """The event id, where it is an integer."""

    @property
    def event_id(self) -> str:
        return str(self.event.event_id)


class Seals:
    """Turns events into rows that only holders of the keys can read, and back."""

    def __init__(self, keys: UserKeys, pseudonym_key: bytes) -> None:
        self.keys = keys
        self._key = pseudonym_key

    def seal(self, pseudonym: str, event_id: str, plain: bytes) -> Row:
        """A row of `SCHEMA` from an event's bytes (`event_bytes`); the user's key must be there."""
        tag = self.tag(pseudonym, event_id)
        return {
            "pseudonym": pseudonym,
            "tag": tag,
            "sealed": self.keys.seal(pseudonym, plain, f"event/{tag}"),
        }

    def open(self, row: Mapping[str, str | bytes], position: tuple[int, int]) -> LoggedEvent:
        """The event in a row; `Forgotten` when its user was."""
        pseudonym, tag, sealed = str(row["pseudonym"]), str(row["tag"]), row["sealed"]
        assert isinstance(sealed, bytes)
        plain = self.keys.open(pseudonym, sealed, f"event/{tag}")
        # Keyed, so that nobody without the key can test a guess at what the user said.
        digest = hmac.digest(self._key, plain, "sha256").hex()
        encoded = json.loads(plain)
        return LoggedEvent(
            user=UserId(self.keys.get(pseudonym).user),
            pseudonym=pseudonym,
            event=decode_event(encoded),
            ref=EventRef(tag=tag, position=position, digest=digest),
            sequence=encoded["event_id"] if isinstance(encoded["event_id"], int) else None,
        )

    def settled(self, logged: LoggedEvent, reason: str) -> SettledEvent:
        """Why an event ends without being trained on. What stands behind a line break came from the
        user's words or code, and goes into the log sealed only."""
        public, _, said = reason.partition("\n")
        detail = (
            b""
            if not said
            else self.keys.seal(logged.pseudonym, said.encode(), f"detail/{logged.ref.tag}")
        )
        return SettledEvent(
            event=logged.ref, reason=public, detail=base64.b64encode(detail).decode()
        )

    def detail(self, pseudonym: str, settled: SettledEvent) -> str:
        """What was sealed."""
        sealed = base64.b64decode(settled.detail)
        return (
            self.keys.open(pseudonym, sealed, f"detail/{settled.event.tag}").decode()
            if sealed
            else ""
        )

    def tag(self, pseudonym: str, event_id: str) -> str:
        """The name under which an event stands in the logs: 128 bits of a keyed hash, hex."""
        return hmac.digest(self._key, f"{pseudonym}/{event_id}".encode(), "sha256").hex()[:32]
