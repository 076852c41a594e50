"""A real browser on a real ``pairloop serve --model fake``: a pick by key, a whole cycle watched on the page, screenshots."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, expect
from tests.browsing import CHROMIUM, PHONE, Visit, chromium, visit
from tests.server import POLICY, user_of

from pairloop.loop.serve import pool_of
from pairloop.policy.fake import quality
from pairloop.types import Pool

CONFIG = """
[policy]
model = "fake"
method = "full"
[train]
min_pairs = 4
[schedule]
min_pairs = 1000
poll = "0.2s"
[gate]
min_picks = 5
min_raters = 5
[evaluate]
prompts = 8
"""
SERVE = """
import sys
from pathlib import Path
from pairloop.config import load_config
from pairloop.web.server import run
config = load_config(Path(sys.argv[1]), env={})
run(config.model_copy(update={"serve": config.serve.model_copy(update={"port": 0})}))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; the page is tested as text in test_pages.py"),
]


@pytest.fixture
def url(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A serving process on a free port; a parameter is more of its configuration."""
    (tmp_path / "pairloop.toml").write_text(CONFIG + getattr(request, "param", ""), encoding="utf-8")
    command = [sys.executable, "-c", SERVE, str(tmp_path)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode().strip()
            assert "listening on" in line, (tmp_path / "log").read_text()
            yield line.rsplit(" ", 1)[1]
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def visitor(pool: Pool) -> str:
    names = (f"visitor-{number:032x}" for number in range(10_000))
    return next(name for name in names if pool_of(name, 0.2) is pool)


def visit_as_trainer(browser: Browser, url: str, **options: Any) -> Visit:
    """The first page for a visitor of the train pool."""
    cookie = {"name": "pairloop_visitor", "value": visitor(Pool.TRAIN), "domain": "127.0.0.1", "path": "/", "expires": -1}
    kept = {"cookies": [{**cookie, "httpOnly": True, "secure": False, "sameSite": "Strict"}], "origins": []}
    return visit(browser, url, storage_state=kept, **options)


def customer_picks(http: httpx.Client, user: str, better: Callable[[list[str]], int]) -> None:
    body = {"model": POLICY, "n": 2, "user": user, "messages": [{"role": "user", "content": f"I am {user}"}]}
    reply = http.post("/v1/chat/completions", json=body).json()
    index = better([choice["message"]["content"] for choice in reply["choices"]])
    pick = {"inference_id": reply["id"], "outcome": "chosen", "chosen_index": index, "latency_ms": 4_000}
    assert http.post("/v1/preferences", json=pick).status_code == 201


def the_higher(texts: list[str]) -> int:
    return max(range(len(texts)), key=lambda index: quality(texts[index]))


def test_a_pick_by_key_and_a_cycle_on_the_page(browser: Browser, url: str, tmp_path: Path) -> None:
    shots = Path(os.environ.get("PAIRLOOP_SCREENSHOTS") or tmp_path / "screenshots")
    shots.mkdir(parents=True, exist_ok=True)
    first = visit_as_trainer(browser, url)
    page = first.page
    page.screenshot(path=shots / "1-idle.png", full_page=True)

    # Asked with Enter, picked with a key; the conversation goes on with the chosen answer.
    page.keyboard.type("Where is my order?")
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("Pick with a button")
    page.screenshot(path=shots / "2-answers.png", full_page=True)
    chosen = page.locator("#text-1").inner_text()
    page.wait_for_timeout(1_100)  # a person needs a second; faster picks are set aside
    page.keyboard.press("2")
    expect(page.locator("#note")).to_contain_text(f"A was {POLICY}@0, B was {POLICY}@0")
    expect(page.locator("#answer-1")).to_have_class("answer chosen")
    expect(page.locator("#live")).to_contain_text("1 new pair of the 1,000")
    page.screenshot(path=shots / "3-picked.png", full_page=True)
    page.keyboard.type("And when will it come?")
    page.keyboard.press("Enter")
    expect(page.locator("#conversation .assistant")).to_contain_text(chosen)
    expect(page.locator("#note")).to_contain_text("Pick with a button")
    page.locator("[data-pick=tie]").click()
    expect(page.locator("#note")).to_contain_text("Recorded")

    with httpx.Client(base_url=url, timeout=30.0, trust_env=False) as http:
        feedback = http.get("/metrics").text
        labels = [f'pairloop_picks_total{{label="{label}"}} 1.0' in feedback for label in "AB"]
        assert sum(labels) == 1  # whichever index stood on the right
        assert 'pairloop_picks_total{label="TIE"} 1.0' in feedback
        for number in range(16):
            customer_picks(http, user_of(Pool.TRAIN, number), the_higher)
        for number in range(8):
            customer_picks(http, user_of(Pool.GATE, number), the_higher)

        # A cycle is asked for; the page follows it without being touched.
        assert http.post("/v1/cycles", json={"reason": "the browser test"}).status_code == 202
        expect(page.locator("#live")).to_contain_text("duelling", timeout=60_000)
        page.screenshot(path=shots / "4-duelling.png", full_page=True)
        judges = 0
        while http.get("/v1/status").json()["cycle"] is not None and judges < 400:
            customer_picks(http, user_of(Pool.GATE, judges), the_higher)
            judges += 1
        expect(page.locator("#live .chip")).to_have_text("PROMOTE")
        expect(page.locator("#live .badge")).to_have_text(f"champion {POLICY}@1")
        page.goto(f"{url}/versions")
        expect(page.locator("#curve svg .point.good a").last).to_have_attribute("aria-label", re.compile("^@1, promoted"))
    page.screenshot(path=shots / "5-promoted.png", full_page=True)

    dark = visit_as_trainer(browser, url, color_scheme="dark")
    dark.page.screenshot(path=shots / "6-dark.png", full_page=True)
    small = visit_as_trainer(browser, url, size=PHONE)
    phone = small.page
    phone.keyboard.type("Where is my order?")
    phone.keyboard.press("Enter")
    expect(phone.locator("#note")).to_contain_text("Pick with a button")
    phone.screenshot(path=shots / "7-phone.png", full_page=True)
    assert small.overflow() <= 0
    phone.goto(f"{url}/docs")
    phone.set_viewport_size({"width": 1000, "height": 800})
    phone.locator("summary", has_text="/v1/preferences").click()
    phone.screenshot(path=shots / "8-docs.png", full_page=True)
    assert [(seen.problems, seen.outside) for seen in (first, dark, small)] == [([], [])] * 3


@pytest.mark.parametrize("url", ["[feedback]\nrepeat_share = 1.0\nrepeat_after = 1\n"], indirect=True)
def test_an_earlier_comparison_comes_again_with_its_sides_swapped(browser: Browser, url: str, tmp_path: Path) -> None:
    seen = visit_as_trainer(browser, url)
    page = seen.page
    shown = []
    for question in ("Where is my order?", "And my refund?"):
        page.keyboard.type(question)
        page.keyboard.press("Enter")
        expect(page.locator("#note")).to_contain_text("Pick with a button")
        shown.append([page.locator(f"#text-{place}").inner_text() for place in (0, 1)])
        page.keyboard.press("1")
        expect(page.locator("#note")).not_to_contain_text("Pick with a button")
    page.get_by_role("button", name="Look at an earlier question").press("Enter")
    expect(page.locator("#note")).to_contain_text("One more: an earlier question of yours")
    expect(page.locator("#question")).to_have_text("Where is my order?")
    assert [page.locator(f"#text-{place}").inner_text() for place in (0, 1)] == shown[0][::-1]
    page.screenshot(path=tmp_path / "repeat.png", full_page=True)
    page.keyboard.press("2")
    expect(page.locator("#note")).to_contain_text("Thank you")
    with httpx.Client(base_url=url, timeout=30.0, trust_env=False) as http:
        flips = http.get("/v1/rater_checks").json()["flip_rate"]
    assert (flips["pairs"], flips["disagreements"]) == (1, 0)
    page.keyboard.type("Thanks, and the next one?")  # the conversation goes on where it was
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("Pick with a button")
    assert (seen.problems, seen.outside) == ([], [])
