"""A real Chromium for tests of pages: contexts that note what the console complains about and what leaves the machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE, PHONE = (1280, 900), (390, 844)

expect.set_options(timeout=30_000)  # its own 5 seconds are few where server, browser and test share a busy core


@dataclass
class Visit:
    """A page somebody has open. ``problems``: what the console said; ``outside``: addresses beyond the server."""

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def serious(self) -> list[str]:
        """What axe-core finds serious or critical on the page as it is now."""
        found = Axe().run(self.page).response["violations"]
        return [
            f"{one['id']}: {one['help']}: {[node['html'][:160] for node in one['nodes'][:3]]}"
            for one in found
            if one["impact"] in ("serious", "critical")
        ]

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


def visit(browser: Browser, url: str, path: str = "/", *, size: tuple[int, int] = WIDE, **options: Any) -> Visit:
    """``path`` in a browser of its own, with cookies of its own."""
    page = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options).new_page()
    seen = Visit(page, url)

    def hear(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            seen.problems.append(f"{page.url}: {message.text}")

    def leave(request: Request) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            seen.outside.append(request.url)

    page.on("console", hear)
    page.on("pageerror", lambda error: seen.problems.append(f"{page.url}: {error}"))
    page.on("request", leave)
    page.goto(url + path)
    return seen
