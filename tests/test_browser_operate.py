"""Datasets, requests, schedule and health in a real browser: a replay with its word diff, a cycle asked for, the doctor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from tests.server import POLICY, RunningServer, fake_config, user_of
from tests.test_browser import ARGS, CHROMIUM
from tests.test_page_datasets import EVIL, compiled, pick

from pairloop.types import Pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; the pages are tested as text"),
]
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    config = fake_config(tmp_path / "s", schedule={"min_pairs": 100_000, "poll": "0.2s"}, train={"min_pairs": 10_000})
    with RunningServer(tmp_path / "s", config=config, turning=True) as running:
        yield running


@pytest.fixture
def tab(server: RunningServer) -> Iterator[Page]:
    """A tab in which nothing may go wrong on its own."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = browser.new_page(base_url=server.url, viewport=DESK)  # type: ignore[arg-type]
        troubles: list[str] = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda line: troubles.append(line.text) if line.type in ("error", "warning") else None)
        page.set_default_timeout(10_000)
        yield page
        browser.close()
    assert troubles == []


def test_an_operator_looks_replays_runs_and_asks_the_doctor(server: RunningServer, tab: Page) -> None:
    server.add_version(1, skill=40)
    asked = [pick(server, user_of(Pool.TRAIN, number), f"{EVIL} {number}") for number in range(12)]
    compiled(server)
    tab.goto("/requests")
    tab.locator("select[name=feedback]").select_option("with")
    tab.get_by_role("button", name="Show").click()
    expect(tab).to_have_url(re.compile("feedback=with"))
    tab.goto(f"/requests/{asked[0]}")
    tab.locator("#replay select[name=model]").select_option(f"{POLICY}@1")
    tab.get_by_role("button", name="Replay").click()
    result = tab.locator("[data-result]")
    expect(result.locator("[data-who]")).to_have_text(f"{POLICY}@1 says now")
    said, before = (result.locator(f"[data-{name}]").inner_text() for name in ("after", "before"))
    assert said.startswith("answer 9")
    if said != before:
        assert result.locator("ins").inner_text() == said.split()[1]
        assert result.locator("del").inner_text() == before.split()[1]

    tab.goto("/datasets")
    tab.locator("#datasets tbody a").first.click()
    assert tab.locator("script:not([src])").count() == 0
    tab.get_by_role("link", name="Next rows").click()
    with tab.expect_download() as taken:
        tab.get_by_role("link", name="train.jsonl").click()
    assert Path(taken.value.path()).read_text().count("\n") > 8

    tab.goto("/schedule")
    tab.get_by_role("button", name="Run a cycle now").click()
    tab.locator("#run-now input").fill("new tone of voice")
    tab.get_by_role("button", name="Run it").click()
    expect(tab.locator("#laps")).to_contain_text("nothing to train")
    expect(tab.locator("#laps")).to_contain_text("new tone of voice")

    tab.goto("/system")
    tab.get_by_role("button", name="Look now").click()
    expect(tab.locator("#doctor")).to_contain_text("missing_artifact")  # that version was registered without one
    tab.set_viewport_size(PHONE)  # type: ignore[arg-type]
    for path in ("/datasets", "/requests", f"/requests/{asked[0]}", "/schedule", "/system"):
        tab.goto(path)
        assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), path
