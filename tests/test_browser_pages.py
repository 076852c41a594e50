"""Every page of the menu in a real browser, on a server as it looks after some days: quiet, accessible, fits a phone."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from tests.browsing import CHROMIUM, PHONE, WIDE, chromium, visit
from tests.server import RunningServer
from tests.showroom import furnish, showroom

from pairloop.web.pages.menu import GROUPS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

PATHS = [entry.path for _, entries in GROUPS for entry in entries]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with showroom(tmp_path_factory.mktemp("showroom")) as server:
        furnish(server, cycles=2)
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.mark.parametrize("path", PATHS)
def test_a_page_is_quiet_and_accessible_and_asks_nobody_else(browser: Browser, server: RunningServer, path: str) -> None:
    for scheme in ("light", "dark"):
        seen = visit(browser, server.url, path, color_scheme=scheme)
        assert seen.serious() == []
        assert (seen.problems, seen.outside) == ([], [])
        assert seen.page.locator("h1").count() == 1
        assert seen.page.locator("nav [aria-current=page]").count() == 1
        seen.page.context.close()


@pytest.mark.parametrize("path", PATHS)
def test_a_page_fits_a_phone(browser: Browser, server: RunningServer, path: str) -> None:
    seen = visit(browser, server.url, path, size=PHONE)
    assert seen.overflow() <= 0
    seen.page.get_by_role("button", name="Menu").click()
    assert seen.page.get_by_role("link", name="Home").is_visible()
    seen.page.context.close()


def test_the_menu_leads_everywhere_by_keyboard(browser: Browser, server: RunningServer) -> None:
    seen = visit(browser, server.url, "/home", size=WIDE)
    seen.page.keyboard.press("Tab")
    assert seen.page.evaluate("document.activeElement.textContent") == "Go to the page's content"
    reached = set()
    for _ in range(len(PATHS) + 4):
        seen.page.keyboard.press("Tab")
        reached.add(seen.page.evaluate("document.activeElement.getAttribute('href')"))
    assert reached >= set(PATHS)


def test_a_plots_figures_as_csv_hold_no_formula(browser: Browser, server: RunningServer) -> None:
    """What a spreadsheet would run gets an apostrophe, and figures stay figures."""
    seen = visit(browser, server.url, "/versions", size=WIDE)
    hostile = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", '=HYPERLINK("http://x","y")']
    harmless = ["-0.25", "12 %", 'said "a, b"']
    with seen.page.expect_download() as taken:
        seen.page.evaluate(
            """(cells) => {  // in one go: the figure is drawn anew when the loop moves
              const figure = document.querySelector("figure.plot");
              const row = figure.querySelector("tbody").insertRow();
              for (const cell of cells) row.insertCell().textContent = cell;
              figure.querySelector("[data-download=csv]").click();
            }""",
            [*hostile, *harmless],
        )
    with Path(taken.value.path()).open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert len(rows) > 1
    assert all(len(row) == len(head) for row in rows[:-1])
    assert rows[-1] == [*("'" + cell for cell in hostile), *harmless]
    seen.page.context.close()


def test_planted_faults_are_found(browser: Browser, server: RunningServer) -> None:
    """A picture without words, a script that fails and a wide block: each is seen by what the other tests look at."""
    seen = visit(browser, server.url, "/home", size=PHONE)
    seen.page.evaluate("document.getElementById('main').append(new Image())")
    seen.page.evaluate("document.getElementById('main').append(Object.assign(document.createElement('input')))")
    assert any("label" in problem or "image-alt" in problem for problem in seen.serious())
    with seen.page.expect_event("pageerror"):
        seen.page.evaluate("setTimeout(() => { throw new Error('planted'); })")
    assert any("planted" in problem for problem in seen.problems)
    seen.page.evaluate("document.getElementById('main').style.width = '2000px'")
    assert seen.overflow() > 0
