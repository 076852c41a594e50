"""The snippet for someone's own page, in a real browser: opened from another origin, its pick lands in the store."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.browsing import ARGS
from tests.server import POLICY, RunningServer, fake_config

from pairloop.store import feedback, groups, keys
from pairloop.types import Label

EXAMPLE = Path(__file__).parent.parent / "examples" / "pick.html"
CHROMIUM = shutil.which("chromium")
Serve = Callable[..., RunningServer]


class Shop:
    """Someone else's web server, with the snippet for a page."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        self.origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="shop")
        self._thread.start()

    def page(self, api: str, key: str = "") -> str:
        text = EXAMPLE.read_text().replace("http://127.0.0.1:8000", api).replace('data-key=""', f'data-key="{key}"')
        (self._folder / "pick.html").write_text(text)
        return f"{self.origin}/pick.html?{len(key)}"  # another one, so that none comes from a cache

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    folder = tmp_path / "shop"
    folder.mkdir()
    running = Shop(folder)
    yield running
    running.close()


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser: Browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser.new_page()
        browser.close()


def ask(page: Page, question: str) -> None:
    page.get_by_placeholder("How can we help?").fill(question)
    page.get_by_role("button", name="Ask").click()


def test_it_is_short_and_writes_text_as_text() -> None:
    script = re.search(r"<script>\n(.*)</script>", EXAMPLE.read_text(), re.DOTALL)
    assert script is not None
    assert len(script[1].splitlines()) <= 40
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|\bsrc=", script[1])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_pick_on_another_sites_page_lands_in_the_store(serve: Serve, shop: Shop, page: Page, tmp_path: Path) -> None:
    server = serve(config=fake_config(tmp_path / "state", serve={"allowed_origins": [shop.origin], "gate_share": 0.0}))
    key, token = keys.new("the page", [keys.Scope.INFERENCE, keys.Scope.FEEDBACK])
    server.store.write(lambda c: keys.insert(c, key))
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(shop.page(server.url))
    ask(page, "Am I let in?")
    expect(page.locator("#note")).to_contain_text("This server needs an API key")
    page.goto(shop.page(server.url, token))
    ask(page, "<b>Where</b> is my order?")
    answers = page.locator("#answers li")
    expect(answers).to_have_count(2)
    shown = [text.removesuffix(" This one is better") for text in answers.all_inner_texts()]
    page.locator("#reason").fill("it is clearer")
    page.get_by_role("button", name="This one is better").nth(1).click()
    expect(page.locator("#note")).to_have_text("Thank you.")
    expect(answers).to_have_text([shown[1]])
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "And when?")
    expect(answers).to_have_count(2)
    assert problems == []
    question = {"role": "user", "content": "<b>Where</b> is my order?"}
    chosen = {"role": "assistant", "content": shown[1]}
    sent: Any = asked.value.post_data_json
    assert sent["messages"] == [question, chosen, {"role": "user", "content": "And when?"}]

    with server.store.reading() as c:
        (pick,) = feedback.recent(c, POLICY, 10)
        group = groups.get(c, pick.group_id)
    assert group is not None
    assert [done.text for done in group.completions] == shown
    assert (pick.label, pick.shown_order, pick.text) == (Label.B, (0, 1), "it is clearer")
    assert pick.rater_id == group.user
    assert pick.latency_ms is not None
    assert 0 < pick.latency_ms < 60_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_page_that_was_not_allowed_reaches_nothing(serve: Serve, shop: Shop, page: Page, tmp_path: Path) -> None:
    server = serve(config=fake_config(tmp_path / "state", serve={"allowed_origins": ["https://other.example"]}))
    page.goto(shop.page(server.url))
    ask(page, "Where is my order?")
    expect(page.locator("#note")).to_have_text("Failed to fetch")
    with server.store.reading() as c:
        assert groups.count(c, POLICY) == 0
