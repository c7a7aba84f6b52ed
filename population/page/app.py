"""The population page: a user's chain, provenance and parked events, live churn, rollbacks; served
by Ray Serve.

Looking needs no token. Actions need one, a session of this browser, and a form that this page
itself has sent. Pages are rendered here and load nothing from anywhere else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

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
    Access,
    Denied,
    PageSetup,
    route_of,
)
from populace.population.page.live import live_rows
from populace.population.page.reader import PopulationReader, UserView
from populace.population.page.tree import tree_of
from populace.population.tools.diff import largest
from populace.storage.errors import InvalidInput, PopulaceError

TEMPLATES = Path(__file__).parent / "templates"
FILES = {"page.css": "text/css", "page.js": "text/javascript", "page.svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; "
    "base-uri 'none'",
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
        self._access = Access(setup)
        self._figures: tuple[float, dict[str, Any] | None] = (0.0, None)
        """The run's report: when the file was written, and what it says."""

    def answer(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
    ) -> Response:
        """One request. `headers` have lower-case names."""
        try:
            self._access.check_host(headers)
            if method == "GET":
                response = self._get(path.strip("/"), _first_values(query), headers)
            elif method == "POST":
                self._access.check_origin(headers)
                form = _first_values(body.decode(errors="replace"))
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
                return self._diff(fields, headers)
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

    def _diff(self, fields: Mapping[str, str], headers: Mapping[str, str]) -> Response:
        user = _field(fields, "id")
        before, after = _number(fields, "before"), _number(fields, "after")
        norms = self.reader.diff(user, before, after)
        shown: dict[str, Any] = {"user": user, "before": before, "after": after, "norms": norms}
        return self._render("diff.html", headers, scale=largest(norms), **shown)

    # Acting.

    def _post(self, path: str, form: Mapping[str, str], headers: Mapping[str, str]) -> Response:
        if path == "sign-in":
            return self._sign_in(form.get("token", ""))
        if not self._access.is_signed_in(headers):
            raise Denied("sign in first: this needs the page's token")
        match path:
            case "sign-out":
                self._access.sign_out(headers)
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
        session = self._access.sign_in(token)
        response = RedirectResponse(".", 303)
        path = f"{route_of(self.setup.population)}/"
        response.set_cookie(
            COOKIE, session, max_age=int(SESSION_S), httponly=True, samesite="strict", path=path
        )
        return response

    def _roll_back(self, user: str, to: int) -> bool:
        """With a population of its own: this waits for a controller's heartbeat, and readers must
        not wait too."""
        population = self._open()
        try:
            return population.rollback(user, to)
        finally:
            population.producer.close()
            self.reader.look_again()

    # Rendering.

    def _render(
        self, name: str, headers: Mapping[str, str], status: int = 200, **values: Any
    ) -> Response:
        common = {
            "population": self.setup.population,
            "query": "",
            "message": "",
            "has_matrix": self._report() is not None,
            "is_signed_in": self._access.is_signed_in(headers),
            "can_sign_in": self._access.has_token,
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


def _first_values(encoded: str) -> dict[str, str]:
    """A query or a form; of a field that comes twice, the first."""
    parsed = parse_qs(encoded, keep_blank_values=True)
    return {name: values[0] for name, values in parsed.items()}


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
        asked = _number(fields, "asked")
        return f"Asked for revision {asked}. The run obeys between two of this user's waves."
    return ""
