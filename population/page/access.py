"""Who may do what on the page: token, session, host, origin."""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import pbkdf2_hmac, sha256
from urllib.parse import urlsplit

COOKIE = "populace-session"
SESSION_S = 8 * 3600.0
MIN_TOKEN = 16
"""Characters."""
TOKEN_VARIABLE = "POPULACE_PAGE_TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSetup:
    """What the page's replica is told; readable in Ray's dashboard, so there is no secret in it."""

    store_url: str
    population: str
    base: str
    keys_folder: str
    hosts: tuple[str, ...]
    """Names that browsers may call it by."""
    token_salt: bytes = b""
    token_digest: bytes = b""
    """PBKDF2 of the token; empty: no actions."""
    report: str = ""
    """Folder with a run's report, for the specialisation matrix."""


class Denied(Exception):
    """An action without what it needs."""


def digest_token(token: str, salt: bytes) -> bytes:
    """Slow, so that whoever sees the digest can't try many tokens."""
    return pbkdf2_hmac("sha256", token.encode(), salt, 200_000)


class Access:
    """The hosts that the page answers to, and the browsers that have signed in. `headers` have
    lower-case names."""

    def __init__(self, setup: PageSetup) -> None:
        self._setup = setup
        self._hosts = {name.lower() for name in setup.hosts}
        self._sessions: dict[str, float] = {}
        """Session -> when it ends, on the monotonic clock."""
        self._lock = threading.Lock()

    @property
    def has_token(self) -> bool:
        """Whether anybody can sign in at all."""
        return bool(self._setup.token_digest)

    def check_host(self, headers: Mapping[str, str]) -> None:
        """A name that isn't this page's may be another site's that was pointed here: `Denied`."""
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""  # in small letters
        if host not in self._hosts:
            raise Denied(f"this page doesn't answer to the host {host!r}; add it to page.hosts")

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """An action must come from a form that this page has sent: `Denied` otherwise."""
        origin = headers.get("origin", "")
        if urlsplit(origin).netloc != headers.get("host", "") or not origin:
            raise Denied("actions must come from this page itself")

    def sign_in(self, token: str) -> str:
        """A new session for who knows the page's token; `Denied` for everybody else."""
        if not self.has_token:
            raise Denied(f"this page allows no actions; start it with {TOKEN_VARIABLE} set")
        digest = digest_token(token, self._setup.token_salt)
        if not hmac.compare_digest(digest, self._setup.token_digest):
            raise Denied("that is not the page's token")
        session, now = secrets.token_urlsafe(32), time.monotonic()
        with self._lock:
            for known in [known for known, ends in self._sessions.items() if ends < now]:
                del self._sessions[known]
            self._sessions[session] = now + SESSION_S
        return session

    def sign_out(self, headers: Mapping[str, str]) -> None:
        """End the session that a request carries; no error without one."""
        with self._lock:
            self._sessions.pop(_cookie(headers), None)

    def is_signed_in(self, headers: Mapping[str, str]) -> bool:
        """Whether a request carries a session that hasn't ended."""
        return self._sessions.get(_cookie(headers), 0.0) > time.monotonic()


def _cookie(headers: Mapping[str, str]) -> str:
    pairs = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), "")


def route_of(population: str) -> str:
    """Populations of one Ray cluster share its proxy, which takes plain names only."""
    if population.isascii():
        return f"/{population}"
    return f"/{sha256(population.encode()).hexdigest()[:12]}"
