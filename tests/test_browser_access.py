"""A real browser at the door: sign-in and back, keys and accounts by dialogs, and another port's page that tries to use it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.browsing import ARGS, CHROMIUM
from tests.server import RunningServer

from pairloop.store import accounts, audit
from pairloop.store.accounts import Role

PASSWORD = "correct horse battery"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with RunningServer(tmp_path / "server") as server:
        yield server


@pytest.fixture
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


def open_page(browser: Browser, url: str, problems: list[str]) -> Page:
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    return page


def sign_in(page: Page, name: str) -> None:
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.keyboard.press("Enter")


def test_from_an_open_server_to_accounts_that_sign_in(server: RunningServer, browser: Browser) -> None:
    problems: list[str] = []
    page = open_page(browser, f"{server.url}/keys", problems)

    # The first key locks the server; its secret stays on the screen until it was taken.
    page.get_by_role("button", name="New key").click()
    page.get_by_label("Name, what it is for").fill("root <b>")
    page.get_by_label("Requests a minute").fill("0")
    page.get_by_role("button", name="Make it").click()
    secret = page.locator("#secret")
    expect(secret).to_contain_text("sk-pairloop-")
    token = secret.inner_text()
    assert server.http.get("/v1/models").status_code == 401
    page.get_by_role("button", name="I have it").click()
    page.wait_for_url("**/login?next=/keys")
    problems.clear()  # the 401 that led here

    # In with the key, and back where it came from; an account is made, changed and removed.
    page.get_by_label("Key", exact=True).fill(token)
    page.keyboard.press("Enter")
    page.wait_for_url("**/keys")
    expect(page.locator(".who")).to_contain_text("root <b> · key")
    for name in ("ada", "lin"):
        page.get_by_role("button", name="New account").click()
        dialog = page.locator("#make-account")
        dialog.get_by_label("Name").fill(name)
        dialog.get_by_label("Role").select_option("rate")
        dialog.get_by_label("Password").fill(PASSWORD)
        dialog.get_by_role("button", name="Make it").click()
        expect(page.locator(f"#account-{name}")).to_contain_text("rate")
    page.get_by_role("button", name="Change lin").click()
    page.locator("#change-account").get_by_label("Role").select_option("operate")
    page.get_by_role("button", name="Change it").click()
    expect(page.locator("#account-lin")).to_contain_text("operate")
    page.get_by_role("button", name="Remove ada").click()
    expect(page.locator("#sure-text")).to_contain_text("“ada”")
    page.keyboard.press("Escape")
    expect(page.locator("#account-ada")).to_have_count(1)
    page.get_by_role("button", name="Remove ada").click()
    page.locator("#sure-verb").click()
    expect(page.locator("#account-ada")).to_have_count(0)

    # Out, and in with the account, which sees what its role opens; the key is revoked beside it.
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/login")
    sign_in(page, "lin")
    page.wait_for_url(f"{server.url}/")
    expect(page.locator(".menu")).not_to_contain_text("Keys")
    page.get_by_role("link", name="Audit").click()
    expect(page.locator("#entries")).to_contain_text("account remove")
    page.get_by_text("Details").first.click()
    expect(page.locator("details[open] pre")).to_have_count(1)
    page.get_by_label("Action").select_option("key_create")
    page.get_by_role("button", name="Filter").click()
    page.wait_for_url("**/audit?action=key_create**")
    expect(page.locator("#entries tbody tr")).to_have_count(1)
    with page.expect_download() as begun:
        page.get_by_role("link", name="JSONL").click()
    assert Path(begun.value.path()).read_text().count("\n") == 1
    assert problems == []


class Evil(BaseHTTPRequestHandler):
    """Another service of the same machine: the same site, for a port makes no other: they send it the ``cookies``."""

    target = ""
    cookies = ""

    def do_GET(self) -> None:
        Evil.cookies = self.headers.get("cookie", "")
        kind, path = ("text/plain", "/v1/cycles") if self.path == "/cycle" else ("", self.path)
        field = "<input name='{\"reason\":\"' value='\"}'>"
        form = f'<form method="post" action="{self.target}{path}" enctype="{kind}">{field}</form>'
        body = f"{form}<script>document.forms[0].submit()</script>"
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None: ...


def test_a_page_of_another_port_is_of_the_same_site_and_still_does_nothing(server: RunningServer, browser: Browser) -> None:
    hashed = accounts.hash_password(PASSWORD)
    server.store.write(lambda c: accounts.create(c, "ada", Role.ADMIN, hashed, actor="test", reason="test"))
    server.app.state.context.keys.forget("ada")
    Evil.target = server.url
    evil = ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    thread = threading.Thread(target=evil.serve_forever)
    thread.start()
    try:
        page = open_page(browser, f"{server.url}/home", [])
        sign_in(page, "ada")
        expect(page.locator(".who")).to_contain_text("ada · admin")
        for path in ("/cycle", "/logout"):
            with page.expect_response(lambda reply: reply.request.method == "POST") as replied:
                page.goto(f"http://127.0.0.1:{evil.server_port}{path}", wait_until="commit")
            assert replied.value.status == 403
            page.wait_for_url(replied.value.url)
            assert "pairloop_session" in Evil.cookies
        page.goto(f"{server.url}/home")
        expect(page.locator(".who")).to_contain_text("ada · admin")
    finally:
        evil.shutdown()
        thread.join()
        evil.server_close()
    with server.store.reading() as c:
        assert audit.list_(c, action="cycle_start") == []


def test_an_opened_reason_stays_open_when_the_trail_is_fetched_anew(server: RunningServer, browser: Browser) -> None:
    verdict = "; ".join(f"rule {number} passed, with its figures and in its own words" for number in range(9))

    def add(reason: str) -> None:
        act = audit.AuditAction.PROMOTE
        server.store.write(lambda c: audit.record(c, act, actor="scheduler", subject="bot@1", reason=reason))

    add(verdict)
    page = open_page(browser, f"{server.url}/audit", [])
    page.locator("#entries summary").first.click()
    add("a newer one")
    page.evaluate("document.body.dispatchEvent(new CustomEvent('loop:moved'))")
    expect(page.locator("#entries tbody tr")).to_have_count(2)
    expect(page.get_by_text("rule 8 passed")).to_be_visible()


def test_who_signs_in_next_sees_nothing_of_who_logged_out(server: RunningServer, browser: Browser) -> None:
    hashed = accounts.hash_password(PASSWORD)
    for name in ("ada", "lin"):
        made = partial(accounts.create, name=name, role=Role.OPERATE, password_hash=hashed, actor="test", reason="test")
        server.store.write(made)
        server.app.state.context.keys.forget(name)
    page = open_page(browser, f"{server.url}/login", [])

    def come_in(name: str) -> None:
        page.context.clear_cookies()
        page.goto(f"{server.url}/login")
        sign_in(page, name)
        expect(page.locator(".who")).to_contain_text(name)
        page.goto(server.url)
        expect(page.locator("#prompt")).to_be_visible()

    def ask_and_pick(name: str) -> None:
        page.locator("#prompt").fill(f"A question of {name}")
        page.locator("#prompt").press("Enter")
        expect(page.locator("#note")).to_contain_text("Pick with a button")
        page.locator("[data-pick=a]").click()
        expect(page.locator("#mine-list")).to_contain_text(f"A question of {name}")

    come_in("ada")
    ask_and_pick("ada")
    # Her session is over without a word from her: what she said is hers alone, and there for her.
    come_in("lin")
    assert "ada" not in page.locator("main").inner_text()
    ask_and_pick("lin")
    assert "ada" not in page.locator("main").inner_text()
    come_in("ada")
    expect(page.locator("#mine-list")).to_contain_text("A question of ada")

    page.context.add_cookies([{"name": "pairloop_visitor", "value": f"visitor-{0:032x}", "url": server.url}])
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/login")
    kept = page.evaluate("[localStorage, sessionStorage].flatMap((kept) => Object.keys(kept))")
    assert [name for name in kept if name.startswith("pairloop.")] == []
    assert [cookie["name"] for cookie in page.context.cookies()] == []
