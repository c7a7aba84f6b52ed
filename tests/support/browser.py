"""A headless Chromium for tests, which tells what it loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, sync_playwright

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Tab:
    """A page, and every address and error that it met."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.addresses: set[str] = set()
        self.errors: list[str] = []
        page.on("request", lambda request: self.addresses.add(urlsplit(request.url).netloc))
        page.on(
            "console",
            lambda message: self.errors.append(message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: self.errors.append(str(error)))


@contextmanager
def chromium() -> Iterator[Tab]:
    """Skips the test where Debian's `chromium` isn't installed; CI installs it."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield Tab(browser.new_page(viewport={"width": 1280, "height": 800}))
        finally:
            browser.close()
