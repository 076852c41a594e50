"""How fast the pages are with a full store: their answers, what a browser paints first, what it loads. No torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import httpx

from pairloop.bench.servers import pairloop_server
from pairloop.bench.settings import Settings
from pairloop.bench.trust_rows import add_groups
from pairloop.config import load_config
from pairloop.scaffold import write_config
from pairloop.store import Store
from pairloop.web.pages.menu import GROUPS
from pairloop.web.pages.rendering import WEB

if TYPE_CHECKING:
    from playwright.sync_api import Browser

POLICY = "bench"
ROWS = 100_000
QUICK_ROWS = 10_000
PARTS = 10
TURNS = 9
MOST_MS, MOST_PAINT_MS, MOST_KB = 300, 1_000, 300
"""The promises, at `ROWS` groups."""
HEADERS = ("page", "answer, ms", "kB", "first paint, ms")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def bench(settings: Settings) -> dict[str, Any]:
    """Medians over the turns, by page; ``paint_ms`` is None where no Chromium or no playwright is installed."""
    folder = settings.folder / "pages"
    shutil.rmtree(folder, ignore_errors=True)
    rows = QUICK_ROWS if settings.quick else ROWS
    _fill(folder, rows, settings)
    load_average = os.getloadavg()[0]
    paths = [entry.path for _, entries in GROUPS for entry in entries]
    with pairloop_server(folder, POLICY) as server, _browser() as browser:
        answers = {path: _answer(server.url + path) for path in paths}
        paints = {path: _paint(browser, server.url, path) for path in paths} if browser is not None else {}
    return {
        "groups": rows,
        "pages": {path: {**answers[path], "paint_ms": paints.get(path, {}).get("paint_ms")} for path in paths},
        "outside": sorted({url for found in paints.values() for url in found["outside"]}),
        "assets_kb": round(sum(file.stat().st_size for file in (WEB / "static").rglob("*") if file.suffix != ".md") / 1e3, 1),
        "load_average": round(load_average, 1),
        "processors": os.cpu_count(),
    }


def rows(found: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """The table of ``bench``, below `HEADERS`."""
    return [
        (path, f"{page['ms']:.0f}", f"{page['kb']:.0f}", "–" if page["paint_ms"] is None else f"{page['paint_ms']:.0f}")
        for path, page in found["pages"].items()
    ]


def sentence(found: Mapping[str, Any]) -> str:
    outside = ", ".join(found["outside"]) or "none"
    return (
        f"{found['groups']:,} groups; at most {MOST_MS} ms an answer, {MOST_PAINT_MS} ms to the first paint; "
        f"assets {found['assets_kb']:.0f} kB (at most {MOST_KB}); requests that left the machine: {outside}"
    )


def _fill(folder: Path, rows: int, settings: Settings) -> None:
    """So many groups, all but a tenth of them with a pick."""
    write_config(folder / "state", {"policy": {"name": POLICY, "model": "fake", "method": "full"}}, force=True)
    with Store.open(load_config(folder / "state")) as store:
        for part in range(PARTS):
            settings.on_step("pages: rows", part, PARTS)
            first, end = part * rows // PARTS, (part + 1) * rows // PARTS
            store.write(partial(_add, first, end))


def _add(first: int, end: int, c: Any) -> None:
    add_groups(c, POLICY, first, end, picked=first > 0)


def _answer(url: str) -> dict[str, float]:
    taken = []
    with httpx.Client(timeout=60.0, trust_env=False) as http:
        for _ in range(TURNS + 1):  # the first one warms up
            begun = perf_counter()
            reply = http.get(url).raise_for_status()
            taken.append(1000 * (perf_counter() - begun))
    return {"ms": round(median(taken[1:]), 1), "first_ms": round(taken[0], 1), "kb": round(len(reply.content) / 1e3, 1)}


@contextmanager
def _browser() -> Iterator[Browser | None]:
    """A Chromium, where there is one and playwright to drive it."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        yield None
        return
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


def _paint(browser: Browser, url: str, path: str) -> dict[str, Any]:
    """First contentful paint of a visitor who comes for the first time; the addresses asked for beyond this server."""
    taken, outside = [], list[str]()
    for _ in range(TURNS):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        page.on("request", lambda request: None if request.url.startswith((url, "data:")) else outside.append(request.url))
        page.goto(url + path)
        taken.append(
            page.evaluate(
                """() => new Promise((resolve) => new PerformanceObserver((list) => {
                    const paint = list.getEntriesByName("first-contentful-paint")[0];
                    if (paint) resolve(paint.startTime);
                }).observe({type: "paint", buffered: true}))"""
            )
        )
        context.close()
    return {"paint_ms": round(median(taken), 1), "outside": outside}
