"""The story on the embedded model: a visitor picks, an operator runs a cycle, watches it, reads the gate, and rolls back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect
from tests.browsing import CHROMIUM, chromium, visit

from pairloop.demo.server import start_server
from pairloop.demo.traffic import Crowd, Tally, open_shop, send
from pairloop.scaffold import starter_recipe, write_config
from pairloop.starter.customers import Behaviour
from pairloop.types import Pool

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

POLICY = "support-bot"
PICKS = 10
CUSTOMERS, HELD_OUT, WAVE = 384, 64, 32
CYCLE_MS = 240_000
GATE_SHARE = 0.2


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    settings = starter_recipe()
    settings["gate"] = {"max_picks": 600}
    settings["schedule"] = {"min_pairs": 0}  # the operator starts the cycle
    settings["serve"] = {"gate_share": GATE_SHARE}
    server = start_server(write_config(tmp_path / "bot", settings), log=tmp_path / "server.log")
    try:
        yield server.url
    finally:
        server.stop()


@pytest.fixture
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


class Customers:
    """The demo's crowd, sent from a thread of its own: playwright has this one's event loop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._crowd = Crowd(0, Behaviour(), GATE_SHARE)
        self._of = {pool: self._crowd.members(pool) for pool in Pool}

    def come(self, pool: Pool, n: int) -> None:
        numbers = list(islice(self._of[pool], n))

        async def visit_shop() -> None:
            async with open_shop(POLICY, lambda: self._url) as shop:
                await send(shop, self._crowd, numbers, Tally())

        with ThreadPoolExecutor(1) as aside:
            aside.submit(asyncio.run, visit_shop()).result()


def test_from_ten_picks_to_a_rollback(browser: Browser, url: str) -> None:
    customers = Customers(url)
    visitor = visit(browser, url, "/")
    for number in range(PICKS):
        visitor.page.keyboard.type(f"Where is my order number {4_000 + number}?")
        visitor.page.keyboard.press("Enter")
        expect(visitor.page.locator("[data-pick=a]")).to_be_enabled()
        visitor.page.wait_for_timeout(1_100)  # a person needs a second; faster picks are set aside
        visitor.page.keyboard.press("1")
        expect(visitor.page.locator("#note")).to_contain_text("Recorded")
    customers.come(Pool.TRAIN, CUSTOMERS)
    customers.come(Pool.GATE, HELD_OUT)

    operator = visit(browser, url, "/home")
    operator.page.get_by_role("button", name="Run a cycle now").click()
    operator.page.locator("dialog[open] [name=reason]").fill("ten picks by keyboard")
    operator.page.locator("dialog[open] button[value=yes]").click()
    expect(operator.page.locator("#live")).to_contain_text("training", timeout=CYCLE_MS)
    expect(operator.page.locator("#live")).to_contain_text("duel", timeout=CYCLE_MS)
    with httpx.Client(base_url=url, timeout=30.0, trust_env=False) as http:
        while http.get("/v1/status").json()["cycle"] is not None:
            customers.come(Pool.GATE, WAVE)
    expect(operator.page.locator("#live")).to_contain_text("PROMOTE")  # told, not asked for again

    operator.page.goto(f"{url}/gates/1")
    expect(operator.page.locator(".chip").first).to_have_text("PROMOTE")
    expect(operator.page.get_by_role("row").filter(has_text="duel")).not_to_have_count(0)
    operator.page.goto(f"{url}/versions")
    expect(operator.page.locator(".plot [data-tip*='@1']")).not_to_have_count(0)

    operator.page.goto(f"{url}/versions/0")
    operator.page.get_by_role("button", name="Roll back").click()
    operator.page.locator("dialog[open] [name=reason]").fill("the story ends where it began")
    operator.page.locator("dialog[open] button[value=yes]").click()
    expect(operator.page.locator("#toasts")).to_contain_text("Rolled back.")
    assert httpx.get(f"{url}/v1/policies/{POLICY}", trust_env=False).json()["champion"] == f"{POLICY}@0"
    assert (visitor.problems, visitor.outside, operator.problems, operator.outside) == ([], [], [], [])
