"""Signing in: accounts and their roles, sessions, what another site's page cannot do, and the headers of every response."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import process_time
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.server import POLICY, RunningServer, chat_body, fake_config

from pairloop.cli import pairloop
from pairloop.config import parse_config
from pairloop.errors import ConflictError, InvalidRequestError
from pairloop.store import Store, accounts, audit, keys, schema, triggers
from pairloop.store.accounts import Cost, Role
from pairloop.store.keys import Scope
from pairloop.web.limits import Buckets
from pairloop.web.login import PER_NAME, PER_NAME_ANYWHERE
from pairloop.web.server import refuse_open_doors
from pairloop.web.sites import own_path

Serve = Callable[..., RunningServer]
PASSWORD = "correct horse battery"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passwords that cost a thousandth of what they should."""
    monkeypatch.setattr(accounts, "COST", Cost(16, 8, 1))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for most of these tests."""
    folder = tmp_path_factory.mktemp("house") / "server"
    with RunningServer(folder, config=fake_config(folder, serve={"trusted_proxies": ["127.0.0.1"]})) as server:
        yield server


@pytest.fixture
def server(house: RunningServer) -> RunningServer:
    """A server with an account of each role and no keys; nobody has tried to sign in yet."""
    tables = (schema.sessions, schema.accounts, schema.keys, schema.audit)
    house.store.write(lambda c: [c.execute(sa.delete(table)) for table in tables])
    house.app.state.context.sign_ins = Buckets()
    house.http.cookies.clear()
    for role in Role:
        add_account(house, f"{role}r", role)
    return house


@pytest.fixture
def browser(server: RunningServer) -> Iterator[httpx.Client]:
    """A client that keeps cookies, and sends its origin as browsers do with what they write."""
    with browser_of(server) as browser:
        yield browser


def browser_of(server: RunningServer) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=20.0, trust_env=False, headers={"origin": server.url})


def add_account(server: RunningServer, name: str, role: Role, password: str = PASSWORD) -> None:
    hashed = accounts.hash_password(password)
    server.store.write(lambda c: accounts.create(c, name, role, hashed, actor="test", reason="test"))
    server.app.state.context.keys.forget(name)


def add_key(server: RunningServer, *scopes: Scope) -> tuple[str, str]:
    """Id and token."""
    key, token = keys.new(None, scopes)
    server.store.write(lambda c: keys.insert(c, key))
    server.app.state.context.keys.forget(key.key_id)
    return key.key_id, token


def sign_in(browser: httpx.Client, name: str, password: str = PASSWORD, **more: str) -> httpx.Response:
    return browser.post("/login", data={"name": name, "password": password, **more})


def token_of(browser: httpx.Client) -> str:
    return browser.cookies["pairloop_session"]


# --- signing in and out


def test_a_page_leads_to_the_login_and_back_and_log_out_ends_it(server: RunningServer, browser: httpx.Client) -> None:
    asked = browser.get("/audit", params={"action": "promote", "actor": "a&b"})
    assert asked.status_code == 303
    for path in ("/static/nothing", "/docs/nothing"):  # open to all, who are told nothing of the pages behind the door
        lost = browser.get(path, headers={"accept": "text/html"})
        assert (lost.status_code, "Error 404" in lost.text, 'href="/keys"' in lost.text) == (404, True, False)
    login = browser.get(asked.headers["location"])
    assert 'name="next" value="/audit?action=promote&amp;actor=a%26b"' in login.text
    unknown, wrong = sign_in(browser, "nobody"), sign_in(browser, "adminr", "wrong horse battery")
    assert (unknown.status_code, wrong.status_code) == (401, 401)
    assert unknown.text.replace("nobody", "adminr") == wrong.text  # nothing tells which of both was wrong
    assert not browser.cookies
    good = sign_in(browser, "adminr", next="/audit?action=promote&actor=a%26b")
    assert (good.status_code, good.headers["location"]) == (303, "/audit?action=promote&actor=a%26b")
    cookie = good.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "max-age=1209600" in cookie
    assert "secure" not in cookie  # http
    page = browser.get("/audit").text
    assert "<b>adminr</b> · admin" in page
    assert browser.get("/login").headers["location"] == "/"  # is signed in already
    token = token_of(browser)
    assert browser.post("/logout").headers["location"] == "/login"
    assert not browser.cookies
    browser.cookies.set("pairloop_session", token)
    assert browser.get("/audit").headers["location"] == "/login?next=/audit"
    mistyped = browser.get("/statsu", headers={"accept": "text/html"})
    assert (mistyped.status_code, mistyped.headers["location"]) == (303, "/login?next=/statsu")
    assert browser.get("/statsu").status_code == 401  # a program is told in JSON
    assert browser.get("/home", headers={"hx-request": "true", "hx-current-url": f"{server.url}/home?a=1"}).status_code == 401
    fragment = browser.get("/page/live", headers={"hx-request": "true", "hx-current-url": f"{server.url}/home?a=1"})
    assert (fragment.status_code, fragment.headers["hx-redirect"]) == (401, "/login?next=/home%3Fa%3D1")


def test_without_keys_and_accounts_nobody_is_asked(serve: Serve) -> None:
    server = serve()
    for path in ("/", "/home", "/keys", "/audit"):
        page = server.http.get(path)
        assert page.status_code == 200
        assert "Log out" not in page.text
        told = server.http.get(path, headers={"x-forwarded-proto": "https"})
        assert "strict-transport-security" not in told.headers  # nobody is believed who is not named a proxy
    assert server.http.get("/login").headers["location"] == "/"
    made = server.http.post("/v1/accounts", json={"name": "ada", "role": "admin", "password": PASSWORD})
    assert made.status_code == 201, made.text
    assert server.http.get("/").headers["location"] == "/login"
    assert server.http.get("/v1/models").status_code == 401


def test_a_key_signs_in_and_is_in_no_cookie_and_its_end_ends_the_session(server: RunningServer, browser: httpx.Client) -> None:
    key_id, token = add_key(server, Scope.OPERATE)
    assert browser.post("/login", data={"key": token}).status_code == 303
    assert token.rsplit("-", 1)[1] not in token_of(browser)
    assert browser.get("/home").status_code == 200
    with server.store.reading() as c:
        (row,) = c.execute(sa.select(schema.sessions)).all()
    assert row.key_id == key_id
    assert token_of(browser).split("-")[1] not in str(row)
    server.store.write(lambda c: keys.revoke(c, key_id, datetime.now(UTC), actor="test", reason="test"))
    server.app.state.context.keys.forget(key_id)
    assert browser.get("/home").status_code == 303
    assert browser.post("/login", data={"key": token}).status_code == 401


def test_another_password_another_role_and_removal_are_seen_at_once(server: RunningServer) -> None:
    with browser_of(server) as admin, browser_of(server) as rater:
        sign_in(admin, "adminr")
        sign_in(rater, "rater")
        assert rater.get("/home").status_code == 403
        assert admin.post("/v1/accounts/rater", json={"role": "operate"}).json()["role"] == "operate"
        assert rater.get("/home").status_code == 200
        assert admin.post("/v1/accounts/rater", json={"password": "another horse battery"}).status_code == 200
        assert rater.get("/home").status_code == 303
        assert sign_in(rater, "rater").status_code == 401
        assert sign_in(rater, "rater", "another horse battery").status_code == 303
        assert admin.delete("/v1/accounts/rater").status_code == 200
        assert rater.get("/home").status_code == 303
        assert sign_in(rater, "rater", "another horse battery").status_code == 401
        for refused in (admin.delete("/v1/accounts/adminr"), admin.post("/v1/accounts/adminr", json={"role": "rate"})):
            assert (refused.status_code, "another admin" in refused.text) == (409, True)
        assert admin.delete("/v1/accounts/nobody").status_code == 404
        body = {"name": "rater", "role": "rate", "password": PASSWORD}
        assert admin.post("/v1/accounts", json=body).status_code == 201  # who was removed may come back
        assert admin.post("/v1/accounts", json=body).status_code == 409
        for fields in ({"name": "a b"}, {"role": "root"}, {"password": "short"}):
            bad = admin.post("/v1/accounts", json={**body, "name": "new", **fields})
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, next(iter(fields)))
            assert "short" not in bad.text
        sign_in(rater, "rater")
        (session,) = admin.get("/v1/sessions", params={"account": "rater"}).json()["data"]
        assert (session["owner"], session["address"]) == ("account:rater", "127.0.0.1")
        assert admin.delete(f"/v1/sessions/{session['id']}").status_code == 200
        assert rater.get("/").status_code == 303
        assert admin.delete(f"/v1/sessions/{session['id']}").status_code == 404
        names = [account["id"] for account in admin.get("/v1/accounts").json()["data"]]
        assert names == ["adminr", "operater", "rater"]
    with server.store.reading() as c:
        trail = [(entry.action, entry.actor, entry.details) for entry in audit.list_(c, subject="account:rater")][:-1]
    assert [action for action, _, _ in trail] == [
        "session_end",
        "account_create",
        "account_remove",
        "account_change",
        "account_change",
    ]
    assert {actor for _, actor, _ in trail} == {"account:adminr"}
    assert trail[-1][2] == {"role": "operate", "previous": "rate", "password": False}


def test_a_session_lasts_over_servers_slides_once_an_hour_and_ends(serve: Serve, server: RunningServer) -> None:
    """The second server reads the first one's database, as the same one does after a restart."""
    with browser_of(server) as browser:
        sign_in(browser, "operater")
        token = token_of(browser)
    other = serve(beside=server)
    cookie = {"cookie": f"$bad; pairloop_session={token}"}
    assert other.http.get("/home", headers=cookie).status_code == 200

    def move(**values: timedelta) -> None:
        rows = {name: datetime.now(UTC) + delta for name, delta in values.items()}
        server.store.write(lambda c: c.execute(sa.update(schema.sessions).values(rows)))
        for one in (server, other):
            one.app.state.context.keys.forget("")

    move(used_at=-timedelta(minutes=50), expires_at=timedelta(days=1))
    assert "set-cookie" not in other.http.get("/home", headers=cookie).headers
    move(used_at=-timedelta(hours=2), expires_at=timedelta(days=1))
    assert f"pairloop_session={token};" in other.http.get("/home", headers=cookie).headers["set-cookie"]
    assert "set-cookie" not in other.http.get("/home", headers=cookie).headers
    other.store.write(lambda _: None)  # nobody waited for the note of its use
    with server.store.reading() as c:
        (expires_at,) = c.execute(sa.select(schema.sessions.c.expires_at)).scalars()
    assert expires_at > datetime.now(UTC) + timedelta(days=13)
    move(expires_at=-timedelta(seconds=1))
    assert other.http.get("/home", headers=cookie).status_code == 303
    forged = {"cookie": f"pairloop_session={token[:-1]}{'0' if token[-1] != '0' else '1'}"}
    move(expires_at=timedelta(days=1))
    assert server.http.get("/home", headers=cookie).status_code == 200
    assert server.http.get("/home", headers=forged).status_code == 303


def test_whoever_guesses_is_told_to_wait_and_the_right_password_does_not_help(
    server: RunningServer, browser: httpx.Client
) -> None:
    for _ in range(PER_NAME):
        assert sign_in(browser, "adminr", "wrong horse battery").status_code == 401
    late = sign_in(browser, "adminr")
    assert (late.status_code, "Try again in" in late.text) == (429, True)
    assert 1 <= int(late.headers["retry-after"]) <= 6
    for _ in range(10):
        assert sign_in(browser, "adminr").status_code == 429
    buckets = server.app.state.context.sign_ins
    left = buckets.take("name:adminr", PER_NAME_ANYWHERE).remaining
    assert left >= PER_NAME_ANYWHERE - PER_NAME - 3, "what is refused takes nothing from the name's owner elsewhere"
    assert sign_in(browser, "operater").status_code == 303
    statuses = [sign_in(browser, f"user{number}").status_code for number in range(30)]
    assert statuses[-1] == 429  # from one address, whatever the name
    assert browser.post("/login", content=b"x" * 9_000).status_code == 413


# --- roles

ROLES_OPEN: Mapping[str, tuple[Role, ...]] = {
    "GET /": tuple(Role),
    "GET /page/live": tuple(Role),
    "GET /v1/queue?rater_id={name}": tuple(Role),
    "GET /v1/models": tuple(Role),
    "GET /home": (Role.OPERATE, Role.ADMIN),
    "GET /audit": (Role.OPERATE, Role.ADMIN),
    "GET /v1/audit": (Role.OPERATE, Role.ADMIN),
    "GET /v1/files": (Role.OPERATE, Role.ADMIN),
    "GET /metrics": (Role.OPERATE, Role.ADMIN),
    "POST /v1/cycles": (Role.OPERATE, Role.ADMIN),
    "GET /keys": (Role.ADMIN,),
    "GET /v1/keys": (Role.ADMIN,),
    "GET /v1/accounts": (Role.ADMIN,),
    "GET /v1/sessions": (Role.ADMIN,),
    "GET /v1/erasures": (Role.ADMIN,),
}


def test_each_role_opens_what_is_its_own_and_its_menu_shows_no_more(server: RunningServer) -> None:
    for role in Role:
        with browser_of(server) as browser:
            sign_in(browser, f"{role}r")
            for route, roles in ROLES_OPEN.items():
                method, path = route.format(name=f"{role}r").split()
                reply = browser.request(method, path)
                assert (reply.status_code == 403) == (role not in roles), (role, route, reply.status_code)
                assert reply.status_code in (200, 202, 403), (role, route, reply.text)
                if reply.status_code == 403:
                    api = path.startswith("/v1/") or path == "/metrics"
                    assert ("insufficient_scope" in reply.text) == api
                    assert ("<h1>Error 403</h1>" in reply.text) != api
                if "text/html" in reply.headers["content-type"] and path != "/page/live":
                    for entry in ("/", "/home", "/keys", "/audit"):
                        assert (f'<li><a href="{entry}"' in reply.text) == (role in ROLES_OPEN[f"GET {entry}"]), (role, entry)
    assert '<li><a href="/' not in server.http.get("/docs").text  # open to all, but the menu is not


def test_a_rater_chats_and_picks(server: RunningServer, browser: httpx.Client) -> None:
    sign_in(browser, "rater")
    reply = browser.post("/v1/chat/completions", json=chat_body(n=2))
    assert reply.status_code == 200, reply.text
    pick = {"inference_id": reply.json()["id"], "outcome": "chosen", "chosen_index": 0}
    assert browser.post("/v1/preferences", json=pick).status_code == 201
    thumb = {"inference_id": reply.json()["id"], "choice_index": 0, "metric_name": "thumbs", "value": True}
    assert browser.post("/v1/feedback", json=thumb).status_code == 201
    _, token = add_key(server, Scope.RATE)  # the scope alone is enough for the pages and what they call
    bearer = {"authorization": f"Bearer {token}"}
    assert server.http.post("/v1/chat/completions", json=chat_body(), headers=bearer).status_code == 200


# --- other sites


def test_what_another_sites_page_sends_does_nothing(server: RunningServer, browser: httpx.Client) -> None:
    """A session writes only where the browser says that our own page sends it: by Origin, or Sec-Fetch-Site without one."""
    sign_in(browser, "adminr")
    session = {"cookie": f"pairloop_session={token_of(browser)}"}
    port = urlsplit(server.url).port or 0
    bad: list[dict[str, str]] = [
        {},
        {"origin": "null"},
        {"origin": "https://evil.example"},
        {"origin": f"http://127.0.0.1:{port + 1}"},
        {"origin": "http://127.0.0.1"},
        {"origin": f"http://localhost:{port}"},
        {"origin": server.url, "sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "cross-site"},
    ]
    tricks: list[dict[str, Any]] = [
        {"json": {"reason": "x"}},
        {"content": b'{"reason": "x"}', "headers": {"content-type": "text/plain"}},
        {"content": b'{"reason": "x=', "headers": {"content-type": "application/x-www-form-urlencoded"}},
        {"files": {"reason": ("x", b"x")}},
    ]
    with server.store.reading() as c:  # the status board remembers for a moment
        before = triggers.peek(c, POLICY)
    for more in bad:
        for trick in tricks:
            headers = {**session, **more, **trick.get("headers", {})}
            reply = server.http.post("/v1/cycles", **{**trick, "headers": headers})
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "cross_site"), (more, trick)
        for path, data in (("/login", {"name": "rater", "password": PASSWORD}), ("/logout", {})):
            reply = server.http.post(path, data=data, headers={**session, **more})
            assert (reply.status_code, "set-cookie" in reply.headers) == (403, False), (path, more)
        assert server.http.delete("/v1/accounts/rater", headers={**session, **more}).status_code == 403
    with server.store.reading() as c:
        assert triggers.peek(c, POLICY) == before
    for good in ({"origin": server.url}, {"sec-fetch-site": "same-origin"}):
        assert server.http.post("/v1/cycles", headers={**session, **good}).status_code == 202
    _, token = add_key(server, Scope.ADMIN)
    assert server.http.post("/v1/cycles", headers={"authorization": f"Bearer {token}"}).status_code == 202  # no browser's doing
    tls = {"x-forwarded-proto": "https", "origin": server.url}  # as a proxy on this machine says
    assert server.http.post("/v1/cycles", headers={**session, **tls}).status_code == 403


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40) | st.from_regex(r"[/\\.@:\t\n a-z?#%0-9]{1,20}", fullmatch=True))
@example("//evil.example")
@example("/\\evil.example")
@example("/\t/evil.example")
@example("https://evil.example/")
@example("javascript:alert(1)")
@example("/login?next=/login")
def test_the_way_back_never_leads_elsewhere(path: str) -> None:
    found = own_path(path)
    if found is not None:
        assert urlsplit(urljoin("http://here.example/login", found)).netloc == "here.example"
        assert found.startswith("/")
        assert found[1:2] not in ("/", "\\")
    assert own_path("/audit?action=promote") == "/audit?action=promote"


def test_the_login_goes_on_to_own_pages_only(server: RunningServer, browser: httpx.Client) -> None:
    for bad in ("//evil.example", "https://evil.example", "/\\evil.example", "/%0d%0aset-cookie: x"):
        assert "evil" not in browser.get("/login", params={"next": bad}).text
        reply = sign_in(browser, "operater", next=bad)
        assert urlsplit(urljoin(server.url, reply.headers["location"])).netloc == urlsplit(server.url).netloc
        assert "x" not in reply.cookies


# --- headers


def test_every_response_says_what_browsers_may_do_with_it(server: RunningServer) -> None:
    _, token = add_key(server, Scope.ADMIN)
    bearer = {"authorization": f"Bearer {token}"}
    for method, path, headers, status in (
        ("GET", "/", bearer, 200),
        ("GET", "/", {}, 303),
        ("GET", "/login", {}, 200),
        ("GET", "/nowhere", bearer, 404),
        ("GET", "/v1/models", {}, 401),
        ("GET", "/v1/models", bearer, 200),
        ("GET", "/audit?since=x", bearer, 400),
        ("GET", "/v1/models", {"host": "evil.example"}, 421),
        ("POST", "/v1/cycles", {"origin": "https://evil.example"}, 403),
        ("PUT", "/v1/cycles", bearer, 405),
        ("GET", "/static/style.css", {}, 200),
        ("GET", "/static/nothing.css", {}, 404),
        ("GET", "/health", {}, 200),
    ):
        reply = server.http.request(method, path, headers=headers)
        assert reply.status_code == status, (path, reply.text)
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert reply.headers.get_list("x-content-type-options") == ["nosniff"]
        assert reply.headers["referrer-policy"] == "same-origin"
        assert reply.headers["cache-control"] == ("max-age=60" if status == 200 and "/static/" in path else "no-store")
        assert "strict-transport-security" not in reply.headers
        secure = server.http.request(method, path, headers={**headers, "x-forwarded-proto": "https"})
        assert secure.headers["strict-transport-security"].startswith("max-age=")
    style = server.http.get("/static/style.css")
    assert server.http.get("/static/style.css", headers={"if-none-match": style.headers["etag"]}).status_code == 304
    origin = server.url.replace("http:", "https:")
    https = {"x-forwarded-proto": "https", "origin": origin}
    assert "; Secure" in server.http.post("/login", data={"key": token}, headers=https).headers["set-cookie"]


# --- passwords


def test_a_password_is_kept_as_a_salted_hash_and_an_unknown_name_takes_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = unicodedata.normalize("NFC", "correct horsé battery")
    first, second = accounts.hash_password(typed), accounts.hash_password(typed)
    assert first != second
    account = accounts.Account("a", Role.RATE, first, datetime.now(UTC))
    assert accounts.matches(account, unicodedata.normalize("NFD", typed))
    assert not accounts.matches(account, "correct horse battery")
    assert first not in repr(account)
    gone = accounts.Account("a", Role.RATE, "", datetime.now(UTC))
    for nobody in (None, gone):
        assert not accounts.matches(nobody, "")
    for bad in ("", "short", "x" * 257):
        with pytest.raises(InvalidRequestError, match="12 to 256"):
            accounts.hash_password(bad)
    monkeypatch.setattr(accounts, "COST", Cost(2**12, 8, 1))
    account = accounts.Account("a", Role.RATE, accounts.hash_password(typed), datetime.now(UTC))

    def cost_of(who: accounts.Account | None) -> float:
        def once() -> float:
            begun = process_time()
            accounts.matches(who, "wrong horse battery")
            return process_time() - begun

        return min(once() for _ in range(5))

    assert 0.5 < cost_of(None) / cost_of(account) < 2
    assert accounts.matches(account, typed)  # what was hashed at another cost is verified at that


def test_the_command_line_makes_accounts_without_a_password_in_sight(tmp_path: Path) -> None:
    config = str(tmp_path / "bot")

    def run(*args: str, stdin: str = "") -> tuple[int, str]:
        done = CliRunner().invoke(pairloop, ["accounts", *args, "--config", config], input=stdin, catch_exceptions=False)
        return done.exit_code, done.output

    assert CliRunner().invoke(pairloop, ["init", config, "--model", "fake"]).exit_code == 0
    assert "no accounts yet" in run("list")[1]
    code, text = run("create", "ada", "--role", "admin", stdin=f"{PASSWORD}\n")
    assert (code, "made the account ada" in text, PASSWORD in text) == (0, True, False)
    assert run("create", "ada", "--role", "rate", stdin=f"{PASSWORD}\n")[0] == 2
    for name, typed, said in (("bob", "short\n", "12 to 256"), ("bob", "", "12 to 256"), ("b b", f"{PASSWORD}\n", "name has")):
        code, text = run("create", name, "--role", "rate", stdin=typed)
        assert (code, said in text) == (2, True), text
    assert run("role", "ada", "--role", "operate") == (0, "ada has the role operate\n")
    assert "sessions have ended" in run("password", "ada", stdin="another horse battery\n")[1]
    assert '"role": "operate"' in run("list", "--json")[1]
    with Store.open(parse_config({"state_dir": tmp_path / "bot"})) as store, store.reading() as c:
        account = accounts.need(c, "ada")
        assert accounts.matches(account, "another horse battery")
        assert not accounts.matches(account, PASSWORD)
        refuse_open_doors(store, fake_config(tmp_path, serve={"host": "0.0.0.0"}))  # an account is enough to open it
    assert run("remove", "ada") == (0, "removed ada\n")
    assert run("remove", "ada")[0] == run("password", "ada", stdin=f"{PASSWORD}\n")[0] == 2


def test_names_that_could_be_something_else_are_refused(server: RunningServer) -> None:
    for name in ("", "-a", "a b", "a:b", "a/b", "ä", "x" * 49, "a\n", "<b>"):
        with pytest.raises(InvalidRequestError, match="account's name"):
            add_account(server, name, Role.RATE)
    add_account(server, "ada@shop.example", Role.RATE)
    with pytest.raises(ConflictError):
        add_account(server, "ada@shop.example", Role.ADMIN)


# --- one name, one who signs in (tests/test_names.py)


def test_a_key_that_shares_a_name_signs_nobody_in_and_the_api_refuses_another(
    server: RunningServer, browser: httpx.Client
) -> None:
    shared, token = keys.new("adminr", [Scope.ADMIN])  # from before names had to be one's own
    server.store.write(lambda c: keys.insert(c, shared))
    refused = browser.post("/login", data={"key": token})
    assert (refused.status_code, "Another key or account is called" in refused.text) == (409, True)
    assert not browser.cookies
    key = {"name": "adminr", "scopes": ["rate"]}
    account = {"name": "adminr", "role": "rate", "password": PASSWORD}
    for path, body in (("/v1/keys", key), ("/v1/accounts", account)):
        told = server.http.post(path, json=body, headers={"authorization": f"Bearer {token}"})  # a program's goes on
        assert (told.status_code, told.json()["error"]["param"]) == (409, "name")
    server.store.write(lambda c: keys.revoke(c, shared.key_id, datetime.now(UTC), actor="test", reason="test"))
