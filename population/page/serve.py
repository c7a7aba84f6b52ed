"""The page behind Ray Serve: starting it, its replica, its address."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from populace.population.client import Population
from populace.population.page.access import (
    MIN_TOKEN,
    TOKEN_VARIABLE,
    PageSetup,
    digest_token,
    route_of,
)
from populace.population.page.app import Page
from populace.storage.errors import InvalidInput
from populace.storage.keys.keyring import Keyring

logger = logging.getLogger(__name__)

MAX_FORM_BYTES = 10_000

FORM_S = 5.0


@serve.deployment(max_ongoing_requests=100)
class PageServer:
    """`Page` behind Ray Serve."""

    def __init__(self, setup: PageSetup) -> None:
        self._page = Page(setup)
        self._prefix = route_of(setup.population)

    async def __call__(self, request: Request) -> Response:
        body = b""
        if request.method == "POST":
            try:
                async with asyncio.timeout(FORM_S):  # who sends slowly must not keep others out
                    async for part in request.stream():
                        body += part
                        if len(body) > MAX_FORM_BYTES:
                            return PlainTextResponse("the form is too long", 413)
            except TimeoutError:
                return PlainTextResponse("the form came too slowly", 408)
        path = request.url.path.removeprefix(self._prefix)
        if not path:  # what pages link to is beside them, so the overview must end with a slash
            return RedirectResponse(f"{self._prefix}/", 308)
        answer = functools.partial(
            self._page.answer, request.method, path, request.url.query, request.headers, body
        )
        response = await asyncio.get_running_loop().run_in_executor(None, answer)
        if response.status_code == 403:
            await asyncio.sleep(1.0)  # guessing is slow
        return response


@contextmanager
def serving_page(
    population: Population, host: str, port: int, hosts: tuple[str, ...], report: str
) -> Iterator[str]:
    """Serve the page of a population while the context lasts; yields its address. Ray must be
    initialised, and host and port are those of its Serve: where that runs already, its own count.
    `InvalidInput` if the port is taken, or the page is served already."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if token and len(token) < MIN_TOKEN:
        raise InvalidInput(
            f"{TOKEN_VARIABLE} has {len(token)} characters; use at least {MIN_TOKEN}: `openssl "
            "rand -hex 16`"
        )
    salt = secrets.token_bytes(16)
    setup = PageSetup(
        store_url=population.store.url,
        population=population.meta.name,
        base=population.meta.base,
        keys_folder=str(Keyring().folder),
        hosts=(host, "localhost", "127.0.0.1", *hosts),
        token_salt=salt,
        token_digest=digest_token(token, salt) if token else b"",
        report=str(Path(report).absolute()) if report else "",
    )
    route = route_of(population.meta.name)
    name = f"populace:{route[1:]}"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    running = serve.status()
    if name in running.applications:
        raise InvalidInput(
            f"this Ray cluster serves {route} already, by a run that lives or was killed; look "
            "there, or end it "
            f"with `python -c 'import ray, ray.serve as s; ray.init(); s.delete(\"{name}\")'`"
        )
    if not running.proxies:  # Serve's own would share the port with whatever has it
        _require_free(host, port)
    serve.start(http_options={"host": host, "port": port})
    # Here: the keys, the base and maybe the store are this machine's.
    options = {"num_cpus": 0, "resources": {f"node:{ray.util.get_node_ip_address()}": 0.001}}
    try:
        served = PageServer.options(ray_actor_options=options).bind(setup)  # type: ignore[attr-defined]
        serve.run(served, name=name, route_prefix=route)
        yield f"http://{host}:{port}{route}/"
    finally:
        try:
            serve.delete(name)
        except Exception as error:  # somebody shut Serve down meanwhile
            logger.warning("the population page could not be removed: %s", error)


def _require_free(host: str, port: int) -> None:
    try:
        socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ).close()
    except OSError as error:
        raise InvalidInput(
            f"page.port is {port} and can't be had at {host} ({error}); choose another one"
        ) from None
