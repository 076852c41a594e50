"""Datasets, requests, schedule and health in a real browser: a replay with its word diff, a cycle asked for, the doctor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect
from tests.browsing import CHROMIUM, PHONE, Visit, chromium, visit
from tests.server import POLICY, RunningServer, fake_config, user_of
from tests.test_page_datasets import EVIL, compiled, pick

from pairloop.types import Pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; the pages are tested as text"),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    config = fake_config(tmp_path / "s", schedule={"min_pairs": 100_000, "poll": "0.2s"}, train={"min_pairs": 10_000})
    with RunningServer(tmp_path / "s", config=config, turning=True) as running:
        yield running


@pytest.fixture
def seen(server: RunningServer) -> Iterator[Visit]:
    """A tab in which nothing may go wrong on its own."""
    with chromium() as browser:
        seen = visit(browser, server.url, "/requests")
        yield seen
    assert (seen.problems, seen.outside) == ([], [])


def test_an_operator_looks_replays_runs_and_asks_the_doctor(server: RunningServer, seen: Visit) -> None:
    tab = seen.page
    server.add_version(1, skill=40)
    asked = [pick(server, user_of(Pool.TRAIN, number), f"{EVIL} {number}") for number in range(12)]
    compiled(server)
    tab.reload()
    tab.locator("select[name=feedback]").select_option("with")
    tab.get_by_role("button", name="Show").click()
    expect(tab).to_have_url(re.compile("feedback=with"))
    tab.goto(server.url + f"/requests/{asked[0]}")
    tab.locator("#replay select[name=model]").select_option(f"{POLICY}@1")
    tab.get_by_role("button", name="Replay").click()
    result = tab.locator("[data-result]")
    expect(result.locator("[data-who]")).to_have_text(f"{POLICY}@1 says now")
    said, before = (result.locator(f"[data-{name}]").inner_text() for name in ("after", "before"))
    assert said.startswith("answer 9")
    if said != before:
        assert result.locator("ins").inner_text() == said.split()[1]
        assert result.locator("del").inner_text() == before.split()[1]

    tab.goto(server.url + "/datasets")
    tab.locator("#datasets tbody a").first.click()
    assert tab.locator("script:not([src])").count() == 0
    tab.get_by_role("link", name="Next rows").click()
    with tab.expect_download() as taken:
        tab.get_by_role("link", name="train.jsonl").click()
    assert Path(taken.value.path()).read_text().count("\n") > 8

    tab.goto(server.url + "/schedule")
    tab.get_by_role("button", name="Run a cycle now").click()
    tab.locator("#run-now input").fill("new tone of voice")
    tab.get_by_role("button", name="Run it").click()
    expect(tab.locator("#laps")).to_contain_text("nothing to train")
    expect(tab.locator("#laps")).to_contain_text("new tone of voice")

    tab.goto(server.url + "/system")
    tab.get_by_role("button", name="Look now").click()
    expect(tab.locator("#doctor")).to_contain_text("broken_artifact")  # that version was registered without one
    dataset = tab.evaluate("fetch('/v1/datasets').then((reply) => reply.json())")["data"][0]["id"]
    for path in (f"/requests/{asked[0]}", f"/datasets/{dataset}", "/system"):
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            tab.goto(server.url + path)
            assert seen.serious() == [], (path, scheme)
        tab.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
        assert seen.overflow() <= 0, path
