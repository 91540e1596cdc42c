"""Shared fixtures; that this file lies here also makes ``tests/*.py`` importable from every folder of tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = Path("/usr/bin/chromium")
# Without them Chromium looks for updates and synchronisation servers.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """Debian's Chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium):
    """Opens pages that must neither log an error nor ask anything of another machine."""

    @contextmanager
    def open_page(expected=(), **options) -> Iterator:
        context = chromium.new_context(**options)
        context.set_default_timeout(120_000)
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)

        def check(request) -> None:
            parts = urlsplit(request.url)
            if parts.scheme not in ("file", "data", "blob") and parts.hostname != "127.0.0.1":
                errors.append(f"request to {request.url}")

        page.on("request", check)
        yield page
        context.close()
        assert [error for error in errors if error not in expected] == []

    return open_page
