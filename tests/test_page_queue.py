"""The pages of the labelling queue and of the raters, as text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from tests.server import POLICY, RunningServer, fake_config, user_of
from tests.store_rows import a_pick
from tests.test_pages import Collector
from tests.test_queue import ASKER, asked, label

from pairloop.store import feedback
from pairloop.types import Pool

ANN, BOB = (user_of(Pool.TRAIN, number) for number in (1, 2))
EVIL = "<script>alert('x')</script>/../\"?#%"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    (tmp_path / "guide.md").write_bytes(b"# Prefer the *right* one\n<script>alert(1)</script>\xff")
    queue = {"guidelines": str(tmp_path / "guide.md"), "reviewers": 2, "gold_share": 0.0}
    config = fake_config(tmp_path, queue=queue, feedback={"repeat_share": 0.0})
    with RunningServer(tmp_path / "state", config=config) as running:
        yield running


def text(server: RunningServer, path: str, status: int = 200) -> str:
    reply = server.http.get(path)
    assert reply.status_code == status, reply.text
    for tag, attributes in Collector(reply.text).tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert tag != "script" or attributes.get("src")
    return reply.text


def column(page: str, number: int) -> list[str]:
    """The words of a column of the first table's body."""
    body = page.split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL) for row in body.split("<tr>")[1:]]
    return [" ".join(re.sub(r"<.*?>", " ", row[number]).split()) for row in rows]


def votes(server: RunningServer, rater: str, n: int, **fields: Any) -> None:
    for group in asked(server, n, rater):
        body = {"inference_id": group, "rater_id": rater, "chosen_index": 0, "latency_ms": 3_000, **fields}
        assert server.http.post("/v1/preferences", json=body).status_code == 201


def test_the_queue_asks_who_labels_and_tells_how_it_goes_and_no_version(server: RunningServer) -> None:
    asking = text(server, "/queue")
    assert "Who labels?" in asking
    assert "form-action 'self'" in server.http.get("/queue").headers["content-security-policy"]
    asked(server, 2)
    label(server, ANN)
    page = text(server, f"/queue?rater={ANN}")
    assert f'data-rater="{ANN}"' in page
    assert re.search(r"You today</dt><dd>1 ", page)
    assert re.search(r"Left for you</dt><dd>2 ", page)  # two look at each
    assert "no comparison has picks of two people yet" in page
    assert "# Prefer the *right* one\n&lt;script&gt;alert(1)&lt;/script&gt;�" in page
    held = server.http.post("/v1/queue/reservations", json={"rater_id": ANN}).text
    assert "support-bot@" not in page + held  # nothing tells a version before the pick
    assert "version" not in held
    version = re.search(r'data-guidelines="([0-9a-f]{12})"', page)
    assert version is not None
    guide = server.config.queue.guidelines
    assert guide is not None
    guide.write_text("other words", encoding="utf-8")
    assert version[0] not in text(server, f"/queue?rater={ANN}")
    guide.unlink()
    assert "cannot be read (No such file or directory)" in text(server, f"/queue?rater={ANN}")
    assert "rater" in text(server, "/queue?rater=", 400)


def test_raters_are_listed_sorted_filtered_and_paged(server: RunningServer) -> None:
    assert "Nobody has picked yet." in text(server, "/raters")
    votes(server, "lefty", 12, shown_order=[0, 1])
    votes(server, "hasty", 11, shown_order=[1, 0], latency_ms=5)
    votes(server, "rare", 1)
    page = text(server, "/raters")
    assert column(page, 0) == ["lefty", "hasty", "rare"]
    assert column(page, 1) == ["12", "11", "1"]
    assert column(page, 3)[:2] == ["100 % (76–100) n 12", "0 % (0–26) n 11"]
    assert "one side p" in column(page, 7)[0]
    assert "instant" in column(page, 7)[1]
    assert column(page, 7)[2] == "too few picks"
    assert column(text(server, "/raters?sort=speed"), 0)[0] == "hasty"
    assert column(text(server, "/raters?flag=instant_picks"), 0) == ["hasty"]
    assert column(text(server, "/raters?flag=none&q=RA"), 0) == ["rare"]
    assert "No rater fits these filters." in text(server, "/raters?held=yes")
    assert "No rater fits these filters." in text(server, "/raters?page=2")
    for bad in ("sort=size", "page=0", "flag=odd", "newest=20000"):
        assert bad.split("=")[0] in text(server, f"/raters?{bad}", 400)
    assert {attributes["data-plot"] for tag, attributes in Collector(page).tags if tag == "figure"} == {
        "picks-by-day",
        "left-shares",
    }


def test_a_rater_with_any_name_has_a_page_and_is_quarantined_from_it_and_gold_is_listed(server: RunningServer) -> None:
    votes(server, EVIL, 11)
    (address,) = {tag["href"] for name, tag in Collector(text(server, "/raters")).tags if name == "a" and "alert" in str(tag)}
    page = text(server, str(address))
    assert "<script>alert" not in page
    assert page.count(": vote") + page.count("<td>vote") == 11
    (form,) = [tag for name, tag in Collector(page).tags if name == "form" and "data-preview" in tag]
    method, path = str(form["data-api"]).split(" ")
    assert (method, path) == ("POST", "/v1/raters/quarantine")
    (named,) = [tag for name, tag in Collector(page).tags if name == "input" and tag.get("name") == "rater_id"]
    assert named["data-type"] == "json"
    who = {"rater_id": json.loads(str(named["value"]))}
    foreseen = server.http.post(path, json={**who, "reason": "preview", "dryrun": True}).json()
    assert (foreseen["pairs"], foreseen["picks"], foreseen["rater_id"]) == (11, 11, EVIL)
    assert server.http.post(path, json={**who, "reason": f"left {EVIL}"}).status_code == 200
    held = text(server, str(address))
    assert "Quarantined since" in held
    assert "/release" in held
    listed = text(server, "/raters?held=yes")
    assert "quarantined" in column(listed, 7)[0]
    assert listed.count("&lt;script&gt;alert") >= 2
    assert "no rater" in text(server, "/raters/one?id=nobody", 404)
    group = asked(server, 1, ASKER)[0]
    body = {"inference_id": group, "chosen_index": 1, "reason": f"known {EVIL}"}
    assert server.http.post("/v1/queue/gold", json=body).status_code == 201
    page = text(server, "/raters")
    assert f"/v1/queue/gold/{group}/take_back" in page
    assert "known &lt;script&gt;" in page


def test_no_name_is_a_path(server: RunningServer) -> None:
    """A browser takes the segments ``.`` and ``..`` out of a path, encoded or not, and a slash divides it."""
    odd = ("..", "a/../b?#%", "%2e", "one&id=c", "ß\u202e\r\n\\")
    for name in odd:
        votes(server, name, 1)
    links = [tag["href"] for kind, tag in Collector(text(server, "/raters")).tags if kind == "a" and "title" in tag]
    assert len(links) == len(odd)
    (group,) = asked(server, 1, "..")
    assert server.http.post("/v1/preferences", json={"inference_id": group, "chosen_index": 0}).status_code == 201
    links += [
        tag["href"] for _, tag in Collector(text(server, f"/requests/{group}")).tags if "/raters/" in (tag.get("href") or "")
    ]
    assert len(links) == len(odd) + 1
    seen = set()
    for link in map(str, links):
        parts = urlsplit(link)
        assert (parts.path, parts.fragment) == ("/raters/one", "")
        (name,) = parse_qs(parts.query, strict_parsing=True, max_num_fields=1)["id"]
        page = Collector(text(server, link))
        (named,) = [tag for kind, tag in page.tags if kind == "input" and tag.get("name") == "rater_id"]
        assert json.loads(str(named["value"])) == name
        seen.add(name)
    assert seen == set(odd)
    for action, is_held in (("quarantine", True), ("release", False)):
        done = server.http.post(f"/v1/raters/{action}", json={"rater_id": "..", "reason": "x"})
        assert (done.status_code, done.json()["rater_id"]) == (200, "..")
        assert ("Quarantined since" in text(server, "/raters/one?id=..")) == is_held
    bare = server.http.post("/v1/raters/quarantine", json={"reason": "x"})
    assert (bare.status_code, bare.json()["error"]["param"]) == (400, "rater_id")


def test_a_raters_picks_are_paged_and_what_is_old_still_has_a_page(server: RunningServer) -> None:
    (group,) = asked(server, 1, BOB)
    for n in range(52):  # each revises the one before
        body = {"inference_id": group, "rater_id": BOB, "chosen_index": n % 2, "latency_ms": 3_000}
        assert server.http.post("/v1/preferences", json=body).status_code == 201
    page = text(server, f"/raters/one?id={BOB}")
    (older,) = re.findall(r"before=(\d+)", page)
    earlier = text(server, f"/raters/one?id={BOB}&before={older}")
    assert (page.count("<td>vote"), earlier.count("<td>vote")) == (50, 2)
    assert "revision 51" in page
    assert "revision 1<" in earlier
    assert "older →" not in earlier
    crowd = [replace(a_pick(group), feedback_id=f"f{n}", rater_id=f"other-{n}", latency_ms=2_000) for n in range(1_000)]
    server.store.write(lambda c: feedback.insert_new(c, crowd, [POLICY] * len(crowd)))
    old = text(server, f"/raters/one?id={BOB}&newest=1000")
    assert "None of everybody's newest 1,000 picks is theirs." in " ".join(old.split())
    assert "of their own newest" in old
    assert "Earlier" not in old
