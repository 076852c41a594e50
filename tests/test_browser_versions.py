"""Home and Versions in a real browser: a promotion by the form moves champion and curve; all fits a phone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest
from playwright.sync_api import Browser, expect
from tests.browsing import CHROMIUM, PHONE, chromium, visit
from tests.server import POLICY, RunningServer
from tests.test_page_versions import EVIL, trained

from pairloop.policy.fake import write_skill
from pairloop.store import samples, triggers, versions
from pairloop.store.samples import Sample
from pairloop.types import Alias

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; the pages are tested as text elsewhere"),
]


@pytest.fixture
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_a_promotion_by_the_form_moves_the_champion_and_the_curve(
    browser: Browser, serve: Callable[..., RunningServer]
) -> None:
    server = serve()
    trained(server, EVIL)
    folder = server.folder / "weights"
    folder.mkdir()
    write_skill(folder, 3)
    server.store.write(lambda c: c.exec_driver_sql(f"UPDATE versions SET path = '{folder}' WHERE number = 1"))

    watching = visit(browser, server.url, "/versions")
    curve = watching.page
    held = curve.locator("#curve svg .point.warn")
    held.locator("a").focus()
    expect(curve.locator(".plot-tip")).to_contain_text("412 pairs · β 0.25")
    curve.get_by_role("link", name="by time").click()
    expect(curve).to_have_url(re.compile(r"x=time"))

    acting = visit(browser, server.url, "/versions")
    page = acting.page
    page.locator("#table").get_by_role("link", name="@1", exact=True).click()
    page.get_by_role("button", name="Promote").click()
    dialog = page.locator("dialog#promote")
    dialog.get_by_role("button", name="Promote").click()
    expect(dialog).to_be_visible()  # not without a reason
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()
    page.get_by_role("button", name="Promote").click()
    dialog.get_by_label("Reason").fill(f"customers love it {EVIL}")
    dialog.get_by_role("button", name="Promote").click()
    expect(page.locator(".toast")).to_have_text(f"{POLICY}@1 is the champion.")
    expect(page.locator("#who .badge")).to_have_text("champion")
    expect(page.locator("#lineage")).to_contain_text("customers love it <script>")
    # The other page, which nobody touched, moved too.
    expect(curve.locator("#curve svg .point.good a").last).to_have_attribute("aria-label", re.compile("^@1, promoted"))
    expect(curve.locator("#table .badge")).to_have_text("champion")

    page.get_by_role("button", name="Roll back to @0").click()
    page.locator("dialog#roll-back").get_by_label("Reason").fill("no, worse")
    page.locator("dialog#roll-back").get_by_role("button", name="Roll back").click()
    expect(page.locator("#who .chip")).to_have_text("rolled back")
    expect(curve.locator("#curve svg .ring")).to_have_count(1)
    with server.store.reading() as c:
        assert versions.alias(c, POLICY, Alias.CHAMPION) == 0
    assert acting.serious() == watching.serious() == []
    assert (acting.problems, acting.outside, watching.problems, watching.outside) == ([], [], [], [])


def test_a_cycle_is_asked_for_from_home_and_a_version_fits_a_phone(
    browser: Browser, serve: Callable[..., RunningServer]
) -> None:
    server = serve()
    seen = visit(browser, server.url, "/home", size=PHONE)
    assert seen.overflow() <= 0  # with the snippet of a fresh install
    seen.page.get_by_role("button", name="Run a cycle now").click()
    seen.page.locator("dialog#run-now").get_by_label("Reason").fill("new tone of voice")
    seen.page.keyboard.press("Enter")
    expect(seen.page.locator(".toast")).to_have_text("A cycle is asked for.")
    expect(seen.page.locator("#live")).to_contain_text("new tone of voice")
    with server.store.reading() as c:
        assert triggers.peek(c, POLICY) == "new tone of voice"
    trained(server, "right to left \u202e" + "x" * 3_000)
    for path in ("/versions/0", "/versions/1"):
        seen.page.goto(server.url + path)
        assert seen.overflow() <= 0, path
        assert seen.serious() == []
    assert (seen.problems, seen.outside) == ([], [])


def test_sample_answers_have_their_words_compared_and_stay_text(browser: Browser, serve: Callable[..., RunningServer]) -> None:
    server = serve()
    trained(server, EVIL)
    asked = server.chat(n=2).json()["id"]
    kept = [Sample(asked, 0, f"It comes on Friday {EVIL}", "It comes soon"), Sample(asked, 0, "y " * 990, "x " * 990)]
    server.store.write(lambda c: samples.put(c, POLICY, 1, kept, datetime.now(UTC)))
    seen = visit(browser, server.url, "/versions/1")
    first, second = (seen.page.locator(".beside .sample").nth(i) for i in (0, 1))
    before, after = (first.locator(".text").nth(i) for i in (0, 1))
    expect(before).to_have_text("It comes soon")
    expect(before.locator("del")).to_have_text("soon")
    expect(after.locator("ins").first).to_have_text("on")
    expect(after).to_contain_text("<script>")
    expect(after.locator("script")).to_have_count(0)
    expect(second.locator("del, ins")).to_have_count(0)  # too long to be compared: both stand without marks
    assert seen.serious() == []
    assert (seen.problems, seen.outside) == ([], [])
