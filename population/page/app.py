"""The population page: a user's chain, provenance and parked events, live churn, rollbacks; served
by Ray Serve.

Looking needs no token. Actions need one, a session of this browser, and a form that this page
itself has sent. Pages are rendered here and load nothing from anywhere else.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import jinja2
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)

from populace.configs.schema import BaseSettings
from populace.population.client import Population
from populace.population.page.access import (
    COOKIE,
    SESSION_S,
    TOKEN_VARIABLE,
    Denied,
    PageSetup,
    _cookie,
    digest_token,
    route_of,
)
from populace.population.page.reader import PopulationReader, UserView, live_rows
from populace.population.page.tree import tree_of
from populace.population.tools.diff import largest
from populace.storage.errors import InvalidInput, PopulaceError

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"

FILES = {"page.css": "text/css", "page.js": "text/javascript", "page.svg": "image/svg+xml"}

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Page:
    """Answers requests; free of Ray Serve."""

    def __init__(self, setup: PageSetup) -> None:
        self.setup = setup
        self.reader = PopulationReader(self._open())
        loader = jinja2.FileSystemLoader(TEMPLATES)
        self._templates = jinja2.Environment(
            loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
        )
        self._sessions: dict[str, float] = {}
        self._lock = threading.Lock()
        self._figures: tuple[float, dict[str, Any] | None] = (0.0, None)
        """Of the run's report: when the file was written, and what it says."""

    def answer(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
    ) -> Response:
        """One request. `headers` have lower-case names."""
        try:
            self._check_host(headers)
            fields = {
                name: values[0] for name, values in parse_qs(query, keep_blank_values=True).items()
            }
            if method == "GET":
                response = self._get(path.strip("/"), fields, headers)
            elif method == "POST":
                self._check_origin(headers)
                text = body.decode(errors="replace")
                form = {
                    name: values[0]
                    for name, values in parse_qs(text, keep_blank_values=True).items()
                }
                response = self._post(path.strip("/"), form, headers)
            else:
                response = PlainTextResponse("use GET or POST", 405)
        except Denied as error:
            response = self._message(str(error), headers, status=403)
        except InvalidInput as error:
            response = self._message(str(error), headers, status=404)
        except PopulaceError as error:
            response = self._message(str(error), headers, status=503 if error.is_temporary else 409)
        except ValueError as error:  # a header or a number that nobody's browser sends
            response = PlainTextResponse(f"that can't be read: {error}", 400)
        response.headers.update(HEADERS)
        return response

    # Looking.

    def _get(self, path: str, fields: Mapping[str, str], headers: Mapping[str, str]) -> Response:
        reader = self.reader
        match path:
            case "":
                totals, recent = reader.totals(), reader.recent()
                return self._render("overview.html", headers, totals=totals, recent=recent)
            case "live.json":
                return JSONResponse(live_rows(reader.controllers()))
            case "user":
                user = reader.find(_field(fields, "id"))
                return self._user(user, headers, fields)
            case "manifest":
                found = reader.manifest(_field(fields, "id"), _number(fields, "revision"))
                return PlainTextResponse(json.dumps(found, indent=1), media_type="application/json")
            case "diff":
                user, before, after = (
                    _field(fields, "id"),
                    _number(fields, "before"),
                    _number(fields, "after"),
                )
                norms = reader.diff(user, before, after)
                return self._render(
                    "diff.html",
                    headers,
                    user=user,
                    before=before,
                    after=after,
                    norms=norms,
                    scale=largest(norms),
                )
            case "matrix" if (figures := self._report()) is not None:
                return self._render(
                    "matrix.html", headers, names=list(figures["users"]), matrix=figures["matrix"]
                )
            case "sign-in":
                return self._render("sign_in.html", headers)
            case _ if path in FILES:
                return Response((TEMPLATES / path).read_bytes(), media_type=FILES[path])
        return self._message(f"there is no page {path!r}", headers, status=404)

    def _user(self, user: str, headers: Mapping[str, str], fields: Mapping[str, str]) -> Response:
        view = self.reader.user(user)
        message = _what_was_done(fields, view)
        parked = self.reader.parked(user)
        return self._render(
            "user.html",
            headers,
            view=view,
            tree=tree_of(view.revisions),
            parked=parked,
            message=message,
            query=user,
        )

    # Acting.

    def _post(self, path: str, form: Mapping[str, str], headers: Mapping[str, str]) -> Response:
        if path == "sign-in":
            return self._sign_in(form.get("token", ""))
        if not self._is_signed_in(headers):
            raise Denied("sign in first: this needs the page's token")
        match path:
            case "sign-out":
                with self._lock:
                    self._sessions.pop(_cookie(headers), None)
                return RedirectResponse(".", 303)
            case "confirm":
                view, to = self.reader.user(_field(form, "id")), _number(form, "to")
                return self._render(
                    "confirm.html",
                    headers,
                    user=view.user,
                    to=to,
                    tip=view.tip,
                    serving=view.serving,
                )
            case "rollback":
                user, to = _field(form, "id"), _number(form, "to")
                is_done = self._roll_back(user, to)
                return RedirectResponse(
                    f"user?id={quote(user)}&{'done' if is_done else 'asked'}={to}", 303
                )
        return self._message(f"there is no action {path!r}", headers, status=404)

    def _sign_in(self, token: str) -> Response:
        if not self.setup.token_digest:
            raise Denied(f"this page allows no actions; start it with {TOKEN_VARIABLE} set")
        if not hmac.compare_digest(
            digest_token(token, self.setup.token_salt), self.setup.token_digest
        ):
            raise Denied("that is not the page's token")
        session, now = secrets.token_urlsafe(32), time.monotonic()
        with self._lock:
            for known in [known for known, ends in self._sessions.items() if ends < now]:
                del self._sessions[known]
            self._sessions[session] = now + SESSION_S
        response = RedirectResponse(".", 303)
        path = f"{route_of(self.setup.population)}/"
        response.set_cookie(
            COOKIE, session, max_age=int(SESSION_S), httponly=True, samesite="strict", path=path
        )
        return response

    def _roll_back(self, user: str, to: int) -> bool:
        """With a population of its own: this waits for a controller's sign of life, and readers
        must not wait too."""
        population = self._open()
        try:
            return population.rollback(user, to)
        finally:
            population.producer.close()
            self.reader.look_again()

    def _is_signed_in(self, headers: Mapping[str, str]) -> bool:
        return self._sessions.get(_cookie(headers), 0.0) > time.monotonic()

    def _check_host(self, headers: Mapping[str, str]) -> None:
        """A name that isn't this page's may be another site's that was pointed here."""
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if host not in [
            name.lower() for name in self.setup.hosts
        ]:  # urlsplit's is in small letters
            raise Denied(f"this page doesn't answer to the host {host!r}; add it to page.hosts")

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        origin = headers.get("origin", "")
        if urlsplit(origin).netloc != headers.get("host", "") or not origin:
            raise Denied("actions must come from this page itself")

    # Rendering.

    def _render(
        self, name: str, headers: Mapping[str, str], status: int = 200, **values: Any
    ) -> Response:
        common = {
            "population": self.setup.population,
            "query": "",
            "message": "",
            "has_matrix": self._report() is not None,
            "is_signed_in": self._is_signed_in(headers),
            "can_sign_in": bool(self.setup.token_digest),
        }
        return HTMLResponse(self._templates.get_template(name).render(common | values), status)

    def _message(self, message: str, headers: Mapping[str, str], status: int) -> Response:
        return self._render("message.html", headers, status, message=message)

    def _report(self) -> dict[str, Any] | None:
        """What the report says; None when there is none, or none that can be read."""
        try:
            path = Path(self.setup.report) / "report.json"
            written_s = path.stat().st_mtime if self.setup.report else 0.0
            if written_s != self._figures[0]:
                self._figures = (written_s, json.loads(path.read_text()))
        except (OSError, ValueError):
            self._figures = (0.0, None)
        return self._figures[1]

    def _open(self) -> Population:
        setup = self.setup
        os.environ.setdefault("POPULACE_KEYS", setup.keys_folder)
        return Population.open(
            setup.store_url, name=setup.population, base=BaseSettings(model=setup.base)
        )


def _field(fields: Mapping[str, str], name: str) -> str:
    value = fields.get(name, "")
    if not value.strip():
        raise InvalidInput(f"{name} is missing; add it")
    return value


def _number(fields: Mapping[str, str], name: str) -> int:
    value = _field(fields, name).strip()
    if not (value.isascii() and value.isdigit() and len(value) < 20):
        raise InvalidInput(f"{name} is {value!r}; use a revision number")
    return int(value)


def _what_was_done(fields: Mapping[str, str], view: UserView) -> str:
    """After an action; never words out of the address, and nothing that isn't so."""
    if "done" in fields and _number(fields, "done") == view.tip:
        return f"Rolled back: tip and serving are revision {_number(fields, 'done')}."
    if "asked" in fields:
        return f"Asked for revision {_number(fields, 'asked')}. The run obeys between two of this user's waves."
    return ""
