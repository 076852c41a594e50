"""A search in a real browser that goes on by itself, to the far end of a store of several windows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect
from tests.browsing import CHROMIUM, chromium, visit
from tests.server import RunningServer
from tests.test_page_preferences_search import bury

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.sqlite("its rows are made inside SQLite"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("zoo") / "server") as made:
        bury(made, 17_000)
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_a_group_at_the_far_end_is_found_without_another_click(browser: Browser, server: RunningServer) -> None:
    seen = visit(browser, server.url, "/preferences?q=stripes")
    page = seen.page
    expect(page.locator("#searched")).to_have_text("Looked through all 17,001 groups, 1 found.")
    expect(page.locator(".found tbody tr")).to_have_count(1)
    expect(page.locator("#found-head h2")).to_have_text("1 group")
    expect(page.locator("#chosen")).to_contain_text("the one group that the filters find")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    page.locator(".found tbody a").click()  # a row that came later opens as the others do
    expect(page.locator("#drawer")).to_contain_text("stripes")
    assert seen.serious() == []
    assert (seen.problems, seen.outside) == ([], [])
    page.context.close()


def test_a_full_page_counts_the_others_when_it_is_asked_to(browser: Browser, server: RunningServer) -> None:
    seen = visit(browser, server.url, "/preferences")
    page = seen.page
    expect(page.locator("#found-head h2")).to_have_text("5,000 groups among the newest 5,000")
    page.locator(".found tbody tr [data-tick]").first.check()
    page.get_by_role("button", name="Count them all").click()
    expect(page.locator("#found-head h2")).to_have_text("17,001 groups")
    expect(page.locator(".found tbody tr")).to_have_count(50)
    expect(page.locator("#chosen")).to_contain_text("1 ticked group")
    assert (seen.problems, seen.outside) == ([], [])
    page.context.close()


def test_a_search_that_is_stopped_leaves_the_way_on(browser: Browser, server: RunningServer) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.route("**/preferences/search?*", lambda _route: None)  # held, so that it is running still
    page.goto(f"{server.url}/preferences?q=stripes")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.get_by_role("link", name="look further back")).to_be_visible()
    context.close()


def test_without_javascript_a_link_leads_from_window_to_window(browser: Browser, server: RunningServer) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{server.url}/preferences?q=stripes")
    for _ in range(3):
        expect(page.locator(".found tbody tr")).to_have_count(0)
        page.get_by_role("link", name="look further back").click()
    expect(page.locator(".found tbody tr")).to_have_count(1)
    context.close()


def test_requests_are_looked_through_to_the_end_too(browser: Browser, server: RunningServer) -> None:
    seen = visit(browser, server.url, "/requests?rater=ann")
    page = seen.page
    expect(page.locator("#searched")).to_contain_text("1 found.")
    expect(page.locator("#requests-rows tr")).to_have_count(1)
    expect(page.locator("#requests-foot")).not_to_contain_text("so far")
    assert seen.serious() == []
    assert (seen.problems, seen.outside) == ([], [])
    page.context.close()


def test_a_search_that_is_refused_or_breaks_off_says_so(browser: Browser, server: RunningServer) -> None:
    page = visit(browser, server.url, "/preferences").page
    page.route("**/preferences/search?*", lambda route: route.fulfill(status=503, body="no place"))
    page.goto(f"{server.url}/preferences?q=stripes")
    expect(page.locator("#searched")).to_have_text("Looking further back … It broke off here; load the page anew to search on.")
    expect(page.locator(".searching button")).to_be_hidden()
    page.context.close()
