"""The labelling queue and a quarantine in a real browser, by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from tests.browsing import CHROMIUM, PHONE, chromium, visit
from tests.server import RunningServer, fake_config, user_of
from tests.test_queue import asked, label

from pairloop.store import feedback
from pairloop.types import Label, Pool

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

ANN = user_of(Pool.TRAIN, 1)
EVIL = "</textarea><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
GUIDE = "# How to choose\n\n- *right* beats polite"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    (tmp_path / "guide.md").write_text(GUIDE, encoding="utf-8")
    queue = {"guidelines": str(tmp_path / "guide.md"), "gold_share": 0.0}
    config = fake_config(tmp_path, queue=queue, feedback={"repeat_share": 0.0})
    with RunningServer(tmp_path / "state", config=config) as running:
        yield running


@pytest.fixture
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def said(server: RunningServer, group: str) -> list[tuple[Label | None, int]]:
    with server.store.reading() as c:
        return [(row.label, row.revision) for row in feedback.history(c, group)]


def test_labelling_by_keyboard_and_a_quarantine(browser: Browser, server: RunningServer) -> None:
    server.chat(n=2, user=ANN, messages=[{"role": "user", "content": EVIL}])
    (hostile,) = [row["inference_id"] for row in [server.http.get("/v1/queue", params={"rater_id": ANN}).json()["item"]]]
    seen = visit(browser, server.url, "/queue")
    page = seen.page
    page.keyboard.type(ANN)
    page.keyboard.press("Enter")
    expect(page.locator("#guide h2")).to_have_text("How to choose")
    expect(page.locator("#asked")).to_have_text(EVIL)
    expect(page.locator("#hold")).to_contain_text("yours for")

    # A pick by key; nothing is left, and what comes is found without being asked for.
    page.keyboard.press("1")
    expect(page.locator("#empty")).to_contain_text("Nothing is left to label.")
    expect(page.locator("#note")).to_contain_text("Recorded: A is better")
    expect(page.locator("#progress")).to_contain_text("1 in all")
    second = asked(server, 1)[0]
    page.keyboard.press("n")
    expect(page.locator("#asked")).to_have_text("case 0")

    # The last one again, revised; then on where it was.
    page.keyboard.press("u")
    expect(page.locator("#asked")).to_have_text(EVIL)
    expect(page.locator("#answer-0")).to_have_class("answer chosen")
    page.keyboard.press("3")
    expect(page.locator("#note")).to_contain_text("Revised: tie")
    expect(page.locator("#asked")).to_have_text("case 0")
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("2")  # nothing is picked behind the dialog
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    expect(page.locator("#guide")).to_be_hidden()
    page.keyboard.press("4")
    expect(page.locator("#note")).to_contain_text("Recorded: both bad")
    with server.store.reading() as c:
        rows = feedback.history(c, hostile)
    assert [(row.label is Label.TIE, row.revision) for row in rows] == [(False, 0), (True, 1)]
    assert {row.tags["guidelines"] for row in rows} == {page.evaluate("document.body.dataset.guidelines")}
    assert (rows[1].latency_ms or 0) > (rows[0].latency_ms or 0) > 0
    assert said(server, second) == [(Label.BOTH_BAD, 0)]

    # The name is remembered, and the guidelines stay folded.
    page.goto(f"{server.url}/queue")
    expect(page.locator("#empty")).to_contain_text("Nothing is left")
    expect(page.locator("#guide")).to_be_hidden()

    page.goto(f"{server.url}/raters")
    page.get_by_role("link", name=ANN).first.click()
    page.get_by_role("button", name="Quarantine …").click()
    expect(page.locator("#effect")).to_contain_text("3 rows of feedback are theirs.")
    page.keyboard.type("only a test")
    page.locator("#decide button[value=yes]").click()
    expect(page.locator(".alarm.bad")).to_contain_text("only a test")
    expect(page.get_by_role("button", name="Release …")).to_be_visible()
    assert page.title() != "owned"
    assert (seen.problems, seen.outside) == ([], [])


def test_the_queue_at_work_and_a_rater_are_accessible_and_fit_a_phone(browser: Browser, server: RunningServer) -> None:
    asked(server, 3)
    label(server, ANN)
    looks: list[dict[str, Any]] = [{"color_scheme": "dark"}, {"color_scheme": "light", "size": PHONE}]
    for path in (f"/queue?rater={ANN}", f"/raters/one?id={ANN}"):
        for options in looks:
            seen = visit(browser, server.url, path, **options)
            if path.startswith("/queue"):
                expect(seen.page.locator("#item")).to_be_visible()
            assert seen.serious() == []
            assert (seen.problems, seen.outside, max(0, seen.overflow())) == ([], [], 0)
            assert seen.page.locator("h1").count() == 1
            seen.page.context.close()
