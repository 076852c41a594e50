"""In a real browser: pages that are refused a stream look by themselves, and a rater whose name is a path's has a page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Route, expect
from tests.browsing import CHROMIUM, chromium, visit
from tests.server import RunningServer, fake_config
from tests.test_page_queue import votes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder: Path = tmp_path_factory.mktemp("callers")
    with RunningServer(folder, config=fake_config(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_a_page_without_a_stream_looks_again_slowly_until_it_has_one(browser: Browser, server: RunningServer) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.clock.install(time=1_000_000)
    page.clock.pause_at(1_000_000)  # from here on only the test moves it: on a busy machine a second more would be a look more
    tried: list[int] = []

    def refuse_twice(route: Route) -> None:
        tried.append(1)
        if len(tried) <= 2:
            route.fulfill(status=503, json={"error": {"message": "full"}}, headers={"retry-after": "30"})
        else:
            route.continue_()

    page.route("**/page/events", refuse_twice)
    with page.expect_response("**/page/events"):
        page.goto(f"{server.url}/home")
    page.evaluate("() => { window.moved = 0; document.body.addEventListener('loop:moved', () => { window.moved += 1; }); }")
    page.clock.run_for(29_000)
    assert (len(tried), page.evaluate("window.moved")) == (1, 0)
    with page.expect_response("**/page/events"):
        page.clock.run_for(2_000)
    assert page.evaluate("window.moved") == 1  # it looked, though nobody told it anything
    with page.expect_response("**/page/events") as opened:
        page.clock.run_for(31_000)
    assert opened.value.status == 200
    page.wait_for_function("window.moved >= 3")  # and now it is told
    page.clock.run_for(120_000)
    assert len(tried) == 3
    context.close()


def test_a_rater_whose_name_browsers_take_out_of_paths(browser: Browser, server: RunningServer) -> None:
    votes(server, "..", 1)
    seen = visit(browser, server.url, "/raters")
    seen.page.get_by_role("link", name="..", exact=True).click()
    expect(seen.page.locator("h1")).to_have_text("..")
    assert seen.page.locator("nav [aria-current=page]").inner_text().strip() == "Raters"
    seen.page.get_by_role("button", name="Quarantine …").click()
    expect(seen.page.locator("#effect")).to_contain_text("1 rows of feedback are theirs.")
    seen.page.get_by_label("Reason, kept with the decision").fill("no such name")
    seen.page.locator("#decide").get_by_role("button", name="Quarantine").click()
    expect(seen.page.locator("#rater")).to_contain_text("Quarantined since")
    seen.page.get_by_role("button", name="Release …").wait_for()
    assert (seen.problems, seen.outside) == ([], [])
    seen.page.context.close()
