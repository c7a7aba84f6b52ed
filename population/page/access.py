"""Who may do what on the page: token, session, host, origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import pbkdf2_hmac, sha256

COOKIE = "populace-session"

SESSION_S = 8 * 3600.0

MIN_TOKEN = 16

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


def _cookie(headers: Mapping[str, str]) -> str:
    pairs = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), "")


def route_of(population: str) -> str:
    """Populations of one Ray cluster share its proxy, which takes plain names only."""
    return (
        f"/{population if population.isascii() else sha256(population.encode()).hexdigest()[:12]}"
    )
