"""A browser on the gate's and the runs' pages: a duel that moves by itself, a training that is cancelled by a button."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from tests.browsing import ARGS, CHROMIUM
from tests.loop_rig import Rig
from tests.server import RunningServer, fake_config, user_of
from tests.test_browser import customer_picks, the_higher

from pairloop.loop.cycle import Loop
from pairloop.types import Pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; the pages are tested as text in test_page_gate.py"),
]

SECTIONS: dict[str, dict[str, Any]] = {
    "schedule": {"min_pairs": 0, "poll": "0.2s"},
    "gate": {"min_picks": 5, "min_raters": 5},
    "evaluate": {"prompts": 8},
    "train": {"min_pairs": 4, "batch_size": 1, "epochs": 50},
}


@pytest.fixture
def page() -> Iterator[Page]:
    """A page that fails the test where its console complains or it is wider than its window."""
    problems: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            problems.append(message.text)

    with sync_playwright() as playwright:
        browser: Browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.on("console", note)
        opened.on("pageerror", lambda error: problems.append(str(error)))
        yield opened
        browser.close()
    assert problems == []


def test_a_training_is_watched_and_cancelled(page: Page, tmp_path: Path) -> None:
    config = fake_config(tmp_path / "server", **SECTIONS)
    with RunningServer(tmp_path / "server", config=config, turning=True) as server:
        rig = Rig(Loop(server.store, server.policy, config, "tester:0"), random.Random(0))
        rig.serve(1_600)  # eighty thousand steps: some twenty seconds, even for the fake policy
        page.goto(f"{server.url}/runs")
        expect(page.locator("#runs")).to_contain_text("No cycle has trained yet")
        server.http.post("/v1/cycles", json={"reason": "the browser test"})

        # The list hears of the run, and the run's page goes on by itself, until it is cancelled with a reason.
        page.locator("#runs a", has_text="cycle 1").click()
        expect(page.locator("#run .chip").first).to_have_text("running")
        expect(page.locator("#run svg.chart").first).to_be_visible()
        page.get_by_role("button", name="Cancel").click()
        page.get_by_label("Reason").fill("only a try")
        page.get_by_role("button", name="Cancel the training").click()
        expect(page.locator("#run .chip").first).to_have_text("cancelled")
        expect(page.locator("#run")).to_contain_text("cancelled: only a try")
        expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
        expect(page.locator("#run svg.chart").first).to_be_visible()
        expect(page.locator("dialog[open]")).to_have_count(0)
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.goto("about:blank")  # hangs up


def test_a_duel_moves_by_itself_and_is_ended(page: Page, tmp_path: Path) -> None:
    quick = {**SECTIONS, "train": {"min_pairs": 4}, "gate": {"min_picks": 50, "min_raters": 5}}
    with RunningServer(tmp_path / "server", config=fake_config(tmp_path / "server", **quick), turning=True) as server:
        for pool, n in ((Pool.TRAIN, 16), (Pool.GATE, 8)):
            for number in range(n):
                customer_picks(server.http, user_of(pool, number), the_higher)
        server.http.post("/v1/cycles", json={"reason": "the browser test"})
        page.goto(f"{server.url}/gates")
        page.locator("#gates a", has_text="cycle 1").click()
        expect(page.locator("#verdict")).to_contain_text("as it stands now")
        expect(page.locator("#verdict")).to_contain_text("no picks yet")
        for number in range(6):
            customer_picks(server.http, user_of(Pool.GATE, number), the_higher)
        expect(page.locator("#verdict")).to_contain_text("n = 6 votes that count")
        page.goto(f"{server.url}/gates/1?show=all")
        expect(page.locator(".compared")).to_have_count(6)
        page.get_by_role("button", name="End this duel").click()
        page.get_by_role("button", name="Let it run").click()
        expect(page.locator("dialog[open]")).to_have_count(0)
        page.get_by_role("button", name="End this duel").click()
        page.get_by_label("Reason").fill("only a try")
        page.get_by_role("button", name="End the duel").click()
        expect(page.locator("#verdict")).to_contain_text("How the cycle ended: cancelled: only a try")
        expect(page.get_by_role("button", name="End this duel")).to_have_count(0)
        page.goto("about:blank")
