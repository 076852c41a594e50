"""Preferences in a real browser: found by words, opened as a drawer, decided about, kept as a view."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect
from tests.browsing import CHROMIUM, chromium, visit
from tests.server import RunningServer
from tests.test_page_preferences import fill

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("shop") / "server") as made:
        fill(made)
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_a_pair_is_found_opened_decided_about_and_its_view_kept(browser: Browser, server: RunningServer) -> None:
    seen = visit(browser, server.url, "/preferences?since=2026-05-01&until=2026-05-31")
    page = seen.page
    expect(page.locator("#funnel")).to_contain_text("somebody picked")
    expect(page.locator(".found tbody tr")).to_have_count(7)

    page.get_by_label("Words in the prompt").fill("parcel")
    page.get_by_role("button", name="Find").click()
    expect(page).to_have_url(f"{server.url}/preferences?q=parcel&since=2026-05-01&until=2026-05-31")
    expect(page.locator(".found tbody tr")).to_have_count(1)

    page.get_by_role("link", name="Where is my parcel?").click()
    drawer = page.locator("#drawer")
    expect(drawer).to_contain_text("version 1")
    assert seen.serious() == []
    drawer.get_by_role("button", name="Exclude").click()
    asked = page.locator("dialog#one-exclude")
    asked.get_by_label("Reason").fill("a test account")
    asked.get_by_role("button", name="Exclude").click()
    expect(drawer).to_contain_text("Excluded from training")
    expect(page.locator(".found tbody tr")).to_contain_text("excluded")
    drawer.get_by_role("button", name="Close").click()

    page.get_by_label("Name of the view").fill("parcels")
    page.get_by_role("button", name="Save view").click()
    expect(page.get_by_role("link", name="parcels")).to_have_attribute("aria-current", "true")
    assert (seen.problems, seen.outside) == ([], [])
    page.context.close()


def test_decisions_are_about_what_is_ticked_or_else_about_all(browser: Browser, server: RunningServer) -> None:
    seen = visit(browser, server.url, "/preferences?kind=train")
    page = seen.page
    expect(page.locator("#chosen")).to_contain_text("all 5 groups")
    page.goto(f"{server.url}/preferences")
    buttons = page.locator("#found form.decision button")
    expect(page.locator("#chosen")).to_contain_text("Tick groups to decide about them, or set a filter")
    assert [buttons.nth(n).is_disabled() for n in range(buttons.count())] == [True] * 4
    page.locator("[data-tick=g-tie]").check()
    expect(page.locator("#chosen")).to_contain_text("1 ticked group.")
    expect(buttons.first).to_be_enabled()
    page.locator("[data-tick=g-tie]").uncheck()
    expect(buttons.first).to_be_disabled()
    page.goto(f"{server.url}/preferences?kind=train")
    page.locator("[data-tick=g-tie]").check()
    page.locator("[data-tick=g-waiting]").check()
    expect(page.locator("#chosen")).to_contain_text("2 ticked groups")
    page.get_by_role("button", name="Relabel").click()
    asked = page.locator("dialog#bulk-relabel")
    expect(asked).to_contain_text("Relabel 2 ticked groups?")
    asked.get_by_label("The votes say").select_option("B")
    asked.get_by_label("Reason").fill("B names the day")
    asked.get_by_role("button", name="Relabel").click()
    expect(page.locator("#toasts")).to_contain_text("2 of 2 groups changed")
    expect(page.locator("#chosen")).to_contain_text("all 5 groups")
    expect(page.locator(".found tbody tr").first).to_contain_text("revised")
    assert (seen.problems, seen.outside) == ([], [])
    page.context.close()
