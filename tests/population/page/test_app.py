"""The population page without Ray Serve: what it answers, whom it refuses, and how it looks at a
large population."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.controller import Controller
from populace.population.experience.events import Task
from populace.population.experience.segments import partition_of
from populace.population.ledger.queries import RevisionInfo
from populace.population.page.access import PageSetup, digest_token
from populace.population.page.app import Page
from populace.population.page.reader import RevisionView
from populace.population.page.tree import tree_of
from populace.population.tools.diff import norms_of
from populace.storage.keys.keyring import Keyring
from populace.storage.log.records import AdapterCreated, RecordBatch
from populace.workers.layout import initial_weights, layout_of
from populace.workers.shapes import AdapterSpec, BaseDims
from tests.support.browser import chromium
from tests.support.loops import run_to_the_end
from tests.support.streams import experience

TOKEN = "the-token-of-this-page"
HOST = {"host": "127.0.0.1:8270"}
FORM = {**HOST, "origin": "http://127.0.0.1:8270"}
NUM_USERS = 100_000


@pytest.fixture
def trained(settings: Settings, start: Callable[..., Controller], tmp_path: Path) -> Population:
    """A few users, trained; events of `user-1` are parked."""
    settings = dataclasses.replace(settings, store=f"file://{tmp_path}/store")
    population = Population.create(settings.store, settings)
    population.enqueue_many(experience(settings, num_users=3, num_tasks=6))
    # Some of them are held out.
    population.enqueue(
        "user-1",
        [Task(event_id=f"b{number}", prompt="sea", reward="raising") for number in range(4)],
    )
    controller = start(population)
    run_to_the_end(controller)
    controller.close()
    population.ownership.release()
    return population


def page_of(population: Population, **changes: Any) -> Page:
    setup = PageSetup(
        store_url=population.store.url,
        population=population.meta.name,
        base=population.meta.base,
        keys_folder=str(Keyring().folder),
        hosts=("127.0.0.1",),
        token_salt=b"salt",
        token_digest=digest_token(TOKEN, b"salt"),
    )
    return Page(dataclasses.replace(setup, **changes))


def get(page: Page, path: str, query: str = "", **headers: str) -> tuple[int, str]:
    answer = page.answer("GET", path, query, {**HOST, **headers}, b"")
    return answer.status_code, bytes(answer.body).decode()


def sign_in(page: Page) -> str:
    answer = page.answer("POST", "/sign-in", "", FORM, f"token={TOKEN}".encode())
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    return cookie.partition(";")[0]


def test_a_user_is_found_by_id_and_by_the_first_digits_of_the_pseudonym(
    trained: Population,
) -> None:
    page = page_of(trained)
    pseudonym = trained.ledger.pseudonym("user-0")
    for query in ("user-0", pseudonym, pseudonym[:8]):
        status, body = get(page, "/user", f"id={query}")
        assert status == 200 and pseudonym in body and "<h1>user-0</h1>" in body
    for query, reason in (
        ("nobody", "has no adapter"),
        ("0123456789ab", "no pseudonym begins with it"),
    ):
        status, body = get(page, "/user", f"id={query}")
        assert status == 404 and reason in body
    assert (
        get(page, "/user") == (404, get(page, "/user")[1])
        and "id is missing" in get(page, "/user")[1]
    )


def test_the_chain_shows_what_the_api_says(trained: Population) -> None:
    view = page_of(trained).reader.user("user-0")
    infos = trained.revisions("user-0")
    assert [item.info.revision for item in view.revisions] == [
        info.revision for info in reversed(infos)
    ]
    for item, info in zip(view.revisions, reversed(infos), strict=True):
        assert item.info == info
        assert ("serving" in item.marks, "tip" in item.marks) == (info.is_serving, info.is_tip)
        if info.committed_at is None:
            assert info.revision == 0 and not item.committed
        else:
            shown = datetime.fromisoformat(f"{item.committed}+00:00").timestamp()
            assert (
                shown <= info.committed_at < shown + 60 and time.time() - info.committed_at < 3600
            )
    assert any(verdict.numbers for item in view.revisions for verdict in item.verdicts), (
        "evaluations have numbers"
    )


def test_parked_events_are_shown_with_what_their_reward_said(trained: Population) -> None:
    page = page_of(trained)
    assert "this reward is broken" in get(page, "/user", "id=user-1")[1]
    assert "Nothing of this user" in get(page, "/user", "id=user-0")[1]


def test_without_a_token_nothing_can_be_done(trained: Population) -> None:
    page, form = page_of(trained), b"id=user-0&to=1"
    for action in ("/rollback", "/confirm", "/sign-out"):
        assert page.answer("POST", action, "", FORM, form).status_code == 403
        guessed = {**FORM, "cookie": "populace-session=guessed"}
        assert page.answer("POST", action, "", guessed, form).status_code == 403
    assert page.answer("POST", "/sign-in", "", FORM, b"token=wrong").status_code == 403
    closed = page_of(trained, token_digest=b"")
    assert closed.answer("POST", "/sign-in", "", FORM, b"token=").status_code == 403
    assert "read-only" in get(closed, "/")[1]
    assert trained.revisions("user-0")[-1].is_tip


def test_with_a_session_a_rollback_is_confirmed_and_done(trained: Population) -> None:
    page = page_of(trained)
    signed_in = {**FORM, "cookie": sign_in(page)}
    asked = page.answer("POST", "/confirm", "", signed_in, b"id=user-0&to=1")
    assert asked.status_code == 200 and b"Roll user-0 back to revision 1?" in asked.body
    assert trained.revisions("user-0")[-1].is_tip, "a question changes nothing"
    done = page.answer("POST", "/rollback", "", signed_in, b"id=user-0&to=1")
    assert done.status_code == 303 and "done=1" in done.headers["location"]
    assert trained.revisions("user-0")[1].is_tip
    location = done.headers["location"].partition("?")[2]
    assert "tip and serving are revision 1" in get(page, "/user", location)[1]
    assert page.reader.user("user-0").tip == 1, "at once"
    assert "Rolled back" not in get(page, "/user", "id=user-0&done=0")[1], "only what is so"
    refused = page.answer("POST", "/rollback", "", signed_in, b"id=user-0&to=99")
    assert refused.status_code == 404 and b"revision 99 does not exist" in refused.body
    assert page.answer("POST", "/sign-out", "", signed_in, b"").status_code == 303
    assert page.answer("POST", "/rollback", "", signed_in, b"id=user-0&to=2").status_code == 403


def test_only_this_page_itself_may_act_and_only_under_its_names(trained: Population) -> None:
    page = page_of(trained)
    body = f"token={TOKEN}".encode()
    for headers in (HOST, {**HOST, "origin": "http://evil.example"}, {**HOST, "origin": "null"}):
        assert page.answer("POST", "/sign-in", "", headers, body).status_code == 403
    pointed_here = {"host": "evil.example", "origin": "http://evil.example"}
    assert page.answer("POST", "/sign-in", "", pointed_here, body).status_code == 403
    assert page.answer("GET", "/", "", {"host": "evil.example"}, b"").status_code == 403
    answer = page.answer("GET", "/", "", HOST, b"")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_what_users_and_rewards_say_is_text_never_markup(trained: Population) -> None:
    evil = "<script>alert(1)</script>"
    trained.enqueue(evil, [Task(event_id="t", prompt="sea", reward="letters")])
    status, body = get(page_of(trained), "/user", "id=%3Cscript%3Ealert(1)%3C/script%3E")
    assert status == 404 and evil not in body and "&lt;script&gt;" in body


def test_a_forgotten_user_is_gone_from_the_page(trained: Population) -> None:
    page = page_of(trained)
    assert get(page, "/user", "id=user-2")[0] == 200
    trained.forget("user-2")
    time.sleep(2.1)  # how old what is shown may be
    status, body = get(page, "/user", "id=user-2")
    assert status == 409 and "was forgotten" in body
    assert "user-2" not in get(page, "/")[1]


def test_what_nobodys_browser_sends_is_refused_and_ids_are_taken_as_they_are(
    trained: Population,
) -> None:
    page = page_of(trained)
    for headers in ({"host": "["}, {**HOST, "origin": "http://["}):
        assert page.answer("POST", "/sign-in", "", headers, b"token=x").status_code in (400, 403)
    for number in ("9" * 5000, "²", "-1", "x"):
        assert (
            page.answer("GET", "/manifest", f"id=user-0&revision={number}", HOST, b"").status_code
            == 404
        )
    assert page.answer("POST", "/sign-in", "", FORM, bytes([0xFF, 0xFE])).status_code == 403
    assert get(page, "/user", "id=user-0%20")[0] == 404, "another user"
    capital = page_of(trained, hosts=("People.Example",))
    assert capital.answer("GET", "/", "", {"host": "people.example"}, b"").status_code == 200


def test_the_specialisation_matrix_is_that_of_the_report(
    trained: Population, tmp_path: Path
) -> None:
    figures = {"users": {"user-0": {}, "user-1": {}}, "matrix": [[1.0, 0.25], [0.5, 0.0]]}
    (tmp_path / "report.json").write_text(json.dumps(figures))
    status, body = get(page_of(trained, report=str(tmp_path)), "/matrix")
    assert (
        status == 200 and [cell in body for cell in ("1.00", "0.25", "0.50", "0.00")] == [True] * 4
    )
    assert get(page_of(trained), "/matrix")[0] == 404
    (tmp_path / "report.json").write_text("{")
    assert get(page_of(trained, report=str(tmp_path)), "/")[0] == 200, "half a report is none"


@pytest.fixture
def many(trained: Population) -> Population:
    """A hundred thousand users more."""
    population = trained
    spec = AdapterSpec(rank=4, expert_rank=1, alpha=32.0, learning_rate=1e-2).as_dict()
    ledger, users = population.ledger, [f"many-{number}" for number in range(NUM_USERS)]
    population.ownership.claim(0.1)
    for partition in range(2):
        names = [
            (ledger.pseudonym(user), user) for user in users if partition_of(user, 2) == partition
        ]
        for first in range(0, len(names), 5000):
            part = names[first : first + 5000]
            created = [AdapterCreated(pseudonym=name, spec=spec, seed=first) for name, _ in part]
            ledger.append(partition, RecordBatch(records=created))
        # Those that are looked at; a key is what names a user.
        for name, user in [*names[:1], *names[-60:]]:
            ledger.keys.ensure(name, user, population.producer._master)
    population.ownership.release()
    return population


@pytest.fixture
def address(many: Population) -> Iterator[str]:
    """The page of that population, on a server in this process."""
    page = page_of(many)

    async def answer(request: Request) -> Response:
        return page.answer(
            request.method,
            request.url.path,
            request.url.query,
            request.headers,
            await request.body(),
        )

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_the_page_works_with_a_hundred_thousand_users_and_loads_nothing_from_elsewhere(
    many: Population, address: str
) -> None:
    with chromium() as tab:
        tab.page.goto(f"{address}/")
        tab.page.wait_for_selector("#controllers >> text=nothing runs")
        assert "100,003" in tab.page.inner_text("dl.figures")
        tab.page.fill("input[name=id]", "user-1")
        tab.page.click("text=Search")
        assert tab.page.inner_text("h1") == "user-1"
        assert tab.page.locator(".tree circle").count() > 1
        tab.page.fill("input[name=id]", many.ledger.pseudonym("many-99999")[:16])
        tab.page.click("text=Search")
        assert tab.page.inner_text("h1") == "many-99999"
        assert tab.addresses == {address.removeprefix("http://")}
        assert not tab.errors


def test_a_branch_takes_a_lane_of_its_own() -> None:
    def view(revision: int, parent: int | None) -> RevisionView:
        return RevisionView(
            info=RevisionInfo(
                revision=revision,
                parent=parent,
                is_tip=False,
                is_serving=False,
                is_kept=True,
                committed_at=None,
                num_events=1,
                metrics={},
                verdicts=(),
            )
        )

    # 0 - 1 - 2 - 3, then from 1 again: 4 - 5
    tree = tree_of([view(5, 4), view(4, 1), view(3, 2), view(2, 1), view(1, 0), view(0, None)])
    lanes = {node.revision: node.x for node in tree.nodes}
    assert lanes[0] == lanes[1] == lanes[2] == lanes[3] < lanes[4] == lanes[5]
    assert len(tree.edges) == 5
    assert len({node.y for node in tree.nodes}) == 6


def test_norms_are_those_of_the_products() -> None:
    shapes = (("q_proj", 6, 5), ("gate_proj", 7, 5), ("up_proj", 7, 5), ("down_proj", 5, 7))
    dims = BaseDims(num_layers=2, num_experts=3, experts_per_token=1, shapes=shapes)
    spec = AdapterSpec(rank=2, expert_rank=1, alpha=8.0, learning_rate=1e-3)
    layout = layout_of(dims, spec.rank, spec.expert_rank)
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(layout.size, generator=generator) for _ in range(2))

    def product(flat: torch.Tensor, module: str, layer: int) -> torch.Tensor:
        a, b = (layout.view(flat, module, layer, which) for which in "ab")
        return spec.scale_of(module) * (b @ a)

    for found in norms_of(layout, spec, before, after):
        pairs = [
            [product(flat, found.module, layer) for flat in (before, after)] for layer in range(2)
        ]
        squares = [sum(float(pair[n].square().sum()) for pair in pairs) for n in range(2)]
        change = sum(float((new - old).square().sum()) for old, new in pairs)
        assert [found.before**2, found.after**2] == pytest.approx(squares, rel=1e-5)
        assert found.change**2 == pytest.approx(change, rel=1e-5)
    same = norms_of(layout, spec, before, before)
    assert all(item.change < 1e-3 * item.before for item in same)
    initial = norms_of(layout, spec, initial_weights(layout, 0), before)
    assert all(item.before == 0.0 for item in initial), "B starts at zero"
