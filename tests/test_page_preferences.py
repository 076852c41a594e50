"""The page of preferences as text: filters, facets, a pair's page, decisions, export, saved views; and that hostile text stays
text."""

from __future__ import annotations

import json
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.server import POLICY, RunningServer
from tests.store_rows import NOW, a_dataset, a_group, a_pick, put_groups, put_picks
from tests.test_pages import Collector

from pairloop.errors import InvalidRequestError
from pairloop.formats import read_rows
from pairloop.loop import curate, pairs
from pairloop.loop.curate import Decision, Selection
from pairloop.loop.pairs import Dropped
from pairloop.loop.serve import pool_of
from pairloop.store import audit, datasets, erasures, feedback, preferences, saved_views, set_aside, versions
from pairloop.store.preferences import State, Wanted
from pairloop.types import GroupKind, Label, Message, Pool, PreferencePair, Source, Version, VersionKind
from pairloop.web.words import MAX_WORDS, WHY, diff

EVIL = '</textarea><script>alert("x")</script>'
RTL = "\u202eevil"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Filled, and only looked at."""
    with RunningServer(tmp_path_factory.mktemp("shop") / "server") as made:
        fill(made)
        yield made


@pytest.fixture
def server(serve: Callable[..., RunningServer]) -> RunningServer:
    """Filled, and the test's own."""
    made = serve()
    fill(made)
    return made


def fill(made: RunningServer) -> None:
    """Eight groups, each its own case; newest vote last."""
    shared: dict[str, Any] = {"policy": POLICY, "user": "ann"}
    put_groups(
        made.store,
        a_group(
            "g-trained", answers=("it left on Monday", "no idea"), prompt=(Message("user", "Where is my parcel?"),), **shared
        ),
        a_group("g-tie", answers=("yes", "yes, of course"), **shared),
        a_group("g-waiting", answers=("Größe M", "100 % sure_thing"), prompt=asked("Welche GRÖSSE? ü"), **shared),
        a_group("g-duel", kind=GroupKind.DUEL, pool=Pool.GATE, **shared),
        a_group("g-evil", answers=(EVIL, RTL), prompt=asked(EVIL), **shared),
        a_group("g-thumb", answers=("one",), prompt="a plain question", **shared),
        a_group("g-silent", **shared),
        a_group("g-held", kind=GroupKind.HELDOUT, pool=Pool.GATE, **shared),
    )
    put_picks(
        made.store,
        a_pick("g-held", "gus", Label.B, feedback_id="f-held", at=-1),
        a_pick("g-trained", "ann", feedback_id="f-trained"),
        a_pick("g-tie", "ann", Label.TIE, feedback_id="f-tie", at=1),
        a_pick("g-duel", "gus", at=2),
        a_pick("g-evil", "mallory<b>", Label.B, text=EVIL, at=3),
        a_pick("g-thumb", "bob", None, metric="thumbs", value=True, choice_index=0, at=4),
        a_pick("g-waiting", "ann", Label.A, at=5),
        a_pick("g-waiting", "bob", Label.A, at=6, latency_ms=4300),
        a_pick("g-waiting", "judge", Label.B, at=7, source=Source.LLM),
    )
    train(made)


PAIRS = [("pair_1", ["g-trained"], ["f-trained"]), ("pair_2", ["g-held"], ["f-held"])]


def asked(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def train(server: RunningServer) -> None:
    """A dataset of one pair and one held out, which left the tie out, and the version that was trained on it."""
    path = str(server.folder / "artifacts" / "data_1")
    version = Version(POLICY, 1, VersionKind.FULL, f"{path}v", "hash-1", 0, "data_1", None, NOW)

    def write(c: Any) -> None:
        row = a_dataset("data_1")
        values = {name: getattr(row, name) for name in row.__dataclass_fields__} | {"policy": POLICY, "path": path}
        datasets.insert(c, type(row)(**values), feedback_seq=3, cycle_id=None, pairs=PAIRS)
        set_aside.put(c, "data_1", {"f-tie": Dropped.TIE.value, "gone": Dropped.SKIP.value}, learned_from=())
        versions.insert(c, version)

    server.store.write(write)


def ids_of(server: RunningServer, wanted: Wanted) -> list[str]:
    with server.store.reading() as c:
        at = preferences.first(c, POLICY)
        found = preferences.page(c, POLICY, wanted, at, 50)
    return [group_id.removeprefix("g-") for group_id in found.group_ids]


ALL = ["waiting", "thumb", "evil", "duel", "tie", "trained", "held"]
CASES: list[tuple[Wanted, list[str]]] = [
    (Wanted(), ALL),
    (Wanted(label="TIE"), ["tie"]),
    (Wanted(label="A", rater="ann"), ["waiting", "trained"]),
    (Wanted(label="B", rater="ann"), []),  # of one and the same vote: the judge's B is not Ann's
    (Wanted(source="llm"), ["waiting"]),
    (Wanted(metric="thumbs"), ["thumb"]),
    (Wanted(kind="duel"), ["duel"]),
    (Wanted(pool="train", version=0), ["waiting", "thumb", "evil", "tie", "trained"]),
    (Wanted(version=7), []),
    (Wanted(reason="tie"), ["tie"]),
    (Wanted(state=State.TRAINED), ["trained"]),
    (Wanted(state=State.LEFT_OUT), ["tie"]),
    (Wanted(state=State.WAITING), ["waiting", "thumb", "evil"]),
    (Wanted(state=State.JUDGED), ["duel"]),
    (Wanted(state=State.KEPT), ["held"]),
    (Wanted(since=NOW + timedelta(minutes=4)), ["waiting", "thumb"]),
    (Wanted(until=NOW + timedelta(minutes=1)), ["trained", "held"]),
    (Wanted(search="PARCEL monday"), ["trained"]),
    (Wanted(search='"left on"'), ["trained"]),
    (Wanted(search='"on left"'), []),
    (Wanted(search="größe"), ["waiting"]),
    (Wanted(search="ü"), ["waiting"]),
    (Wanted(search="100 % e_t"), ["waiting"]),
    (Wanted(search="%"), ["waiting"]),  # as it stands, not as a pattern
    (Wanted(search="_"), ["waiting"]),
    (Wanted(search="content"), []),  # a key of the JSON, no word of anybody
    (Wanted(search="plain"), ["thumb"]),
    (Wanted(search='"</textarea><script>"'), ["evil"]),
    (Wanted(search='("x")'), ["evil"]),
]


def test_filters_find_what_they_say(shop: RunningServer) -> None:
    for wanted, expected in CASES:
        assert ids_of(shop, wanted) == expected, wanted


def test_facets_count_what_their_links_would_find(shop: RunningServer) -> None:
    with shop.store.reading() as c:
        counted = preferences.counted(c, POLICY, Wanted(), preferences.first(c, POLICY))
    assert counted.groups == len(ALL)
    assert counted.facets["label"] == {"A": 3, "B": 3, "TIE": 1}
    assert counted.facets["state"] == {"waiting": 3, "left_out": 1, "kept": 1, "trained": 1, "judged": 1}
    for facet, values in counted.facets.items():
        for value, n in values.items():
            read = {"version": int, "state": State}.get(facet, str)
            assert n == len(ids_of(shop, Wanted(**{facet: read(value)}))), (facet, value)


def test_the_listing_goes_on_where_it_stopped_and_looks_on_behind_a_window(server: RunningServer) -> None:
    with server.store.reading() as c:
        at = preferences.first(c, POLICY)
        pages = []
        place: preferences.Place | None = at
        while place is not None:
            found = preferences.page(c, POLICY, Wanted(), place, 4)
            pages.append(found.group_ids)
            place = found.next
    assert [len(ids) for ids in pages] == [4, 3]
    put_picks(server.store, a_pick("g-trained", "zoe"))  # comes to the front, and leaves the listing of before as it was
    with server.store.reading() as c:
        ids = [group_id for part in preferences.each(c, POLICY, Wanted(), at, window=2) for group_id in part]
        first = preferences.page(c, POLICY, Wanted(label="TIE"), preferences.first(c, POLICY), 4, window=2)
        assert preferences.counted(c, POLICY, Wanted(), at, window=2).is_cut
    assert [group_id.removeprefix("g-") for group_id in ids] == ALL
    assert first.group_ids == []
    assert first.is_cut


def test_hostile_words_stay_words(server: RunningServer) -> None:
    for path in ("/preferences", "/preferences/g-evil", "/preferences?rater=mallory%3Cb%3E&q=%3Cscript%3E"):
        text = server.http.get(path).text
        assert "<script>alert" not in text
        assert "mallory<b>" not in text
        assert RTL in text
        for tag, attributes in Collector(text).tags:
            assert not [name for name in attributes if name.startswith("on") or name == "style"]
            assert tag != "script" or attributes.get("src")
    big = "word " * 200_000
    put_groups(server.store, a_group("g-big", answers=(big, "x\udc80".encode("utf-8", "replace").decode()), policy=POLICY))
    put_picks(server.store, a_pick("g-big"))
    page = server.http.get("/preferences/g-big")
    assert len(page.content) < 60_000
    assert "1,000,000 characters in all" in page.text


def test_a_pairs_page_says_everything_about_it(shop: RunningServer) -> None:
    text = shop.http.get("/preferences/g-waiting").text
    for word in ("3 votes", "4.3 s", "judge", "No dataset has looked at it yet"):
        assert word in text
    assert "which was trained version 1" in shop.http.get("/preferences/g-trained").text.replace("\n", " ")
    assert WHY["tie"] in shop.http.get("/preferences/g-tie").text
    for name, told in {  # by its state, and the request's own page says the same
        "waiting": "No dataset has looked at it yet: the next one will.",
        "tie": f"Left out. {WHY['tie']}",
        "duel": "In no dataset: its votes judged a version in a duel, and such votes do not train.",
        "silent": "In no dataset: nobody has said anything about it.",
        "trained": "In dataset ",
    }.items():
        for path in ("preferences", "requests"):
            assert told in shop.http.get(f"/{path}/g-{name}").text, (path, name)
    assert shop.http.get("/preferences/nobody").status_code == 404
    assert "Nobody has said anything" in shop.http.get("/preferences/g-silent").text


def test_the_word_diff_loses_nothing() -> None:
    first, second = diff("It left on Monday.", "It left, on <b>Tuesday</b>.") or ([], [])
    assert "".join(piece.text for piece in first) == "It left on Monday."
    assert "".join(piece.text for piece in second) == "It left, on <b>Tuesday</b>."
    assert [piece.text for piece in first if piece.is_own] == ["Monday"]
    assert set(WHY) <= {reason.value for reason in Dropped}


def steps(first: str, second: str) -> int:
    """How many functions a diff calls: its work, whatever the machine has to do besides."""
    made = count()
    sys.setprofile(lambda *_: next(made))
    try:
        diff(first, second)
    finally:
        sys.setprofile(None)
    return next(made)


def test_the_word_diff_of_long_answers_is_bounded_in_work_and_memory() -> None:
    words = MAX_WORDS // 2
    longest, moved = "a " * words, " a" * words  # few words that repeat are the worst case
    assert diff(longest, moved) is not None
    assert steps(longest, moved) < 150_000
    for text in ("a " * 500_000, longest + "a"):
        tracemalloc.start()
        try:
            assert diff(text, moved) is diff(moved, text) is None
            assert tracemalloc.get_traced_memory()[1] < 50_000  # it stops reading: all words of a megabyte take 8 MB and more
        finally:
            tracemalloc.stop()
        assert steps(text, moved) < 100


def test_parameters_that_make_no_sense_are_named(shop: RunningServer) -> None:
    for query, name in (
        ("state=lost", "state"),
        ("since=yesterday", "since"),
        ("x=1", "x"),
        ("after=12", "after"),
        ("version=-1", "version"),
    ):
        page = shop.http.get(f"/preferences?{query}")
        assert page.status_code == 400
        assert f"{name}" in page.text
        assert 'role="alert"' in page.text
    assert shop.http.get("/preferences?q=&state=&label=&rater=").status_code == 200  # a form's empty fields
    assert shop.http.get("/preferences/funnel?since=2026-02-02&until=2026-01-01").status_code == 400
    assert shop.http.get("/v1/groups/export?format=nonsense").json()["error"]["param"] == "format"


def test_the_funnel_counts_comparisons_that_were_served(shop: RunningServer) -> None:
    text = shop.http.get("/preferences/funnel?since=2026-05-01&until=2026-05-31").text
    counts = [int(value) for value in re.findall(r"<meter[^>]*>(\d+)</meter>", text)]
    assert counts == [7, 7, 6, 2, 1]  # the answer with a thumb is no comparison, the silent one was not voted on
    assert "No comparison was served" in shop.http.get("/preferences/funnel?since=2020-01-01&until=2020-01-02").text


def test_what_is_exported_is_what_is_found_and_can_be_read_back(shop: RunningServer, tmp_path: Path) -> None:
    for query in ({"metric": "preference"}, {"label": "A"}, {"q": "parcel"}, {"label": "TIE"}):
        reply = shop.http.get("/v1/groups/export", params=query)
        lines = reply.text.splitlines()
        found = ids_of(shop, Wanted(search=query.get("q"), label=query.get("label"), metric=query.get("metric")))
        assert int(reply.headers["x-pairloop-groups"]) == len(lines) == len(found)
        assert [json.loads(line)["comparison"]["prompt_conversation"][-1]["content"] for line in lines]
        path = tmp_path / "export.jsonl"
        path.write_text(reply.text, encoding="utf-8")
        back = read_rows(path).or_raise().groups
        assert len(back) == len(found)
    labelled = {one.group.completions[0].text: one.feedback for one in back}
    assert [row.label for row in labelled["yes"]] == [Label.TIE]
    openai = shop.http.get("/v1/groups/export", params={"format": "openai", "label": "TIE"})
    assert (openai.text, openai.headers["x-pairloop-groups"]) == ("", "1")  # it has no place for a tie


def decide(server: RunningServer, verb: str, **body: Any) -> dict[str, Any]:
    reply = server.http.post(f"/v1/groups/{verb}", json={"reason": "a test account", **body})
    assert reply.status_code == 200, reply.text
    said: dict[str, Any] = reply.json()
    return said


def test_an_excluded_group_is_not_trained_on_until_it_is_included_again(server: RunningServer) -> None:
    def usable() -> list[str]:
        new = pairs.compile_new(server.store, None, server.config, parent=0)
        return [group_id for pair in new.compiled.pairs for group_id in pair.group_ids]

    assert "g-waiting" in usable()
    found = pairs.count_new(server.store, server.config)
    assert decide(server, "exclude", filters={"q": "größe"}, dryrun=True)["changed"] == 1
    assert "g-waiting" in usable()
    assert decide(server, "exclude", filters={"q": "größe"}) == {
        "object": "groups.decided",
        "selected": 1,
        "changed": 1,
        "dryrun": False,
    }
    assert decide(server, "exclude", ids=["g-waiting"])["changed"] == 0
    new = pairs.compile_new(server.store, None, server.config, parent=0)
    assert "g-waiting" not in usable()
    assert pairs.count_new(server.store, server.config) == found - 3  # nothing that would start a cycle again and again
    assert new.dropped[Dropped.EXCLUDED] == 3
    assert ids_of(server, Wanted(state=State.EXCLUDED)) == ["waiting"]
    assert "a test account" in server.http.get("/preferences/g-waiting").text
    assert decide(server, "include", ids=["g-waiting"])["changed"] == 1
    assert "g-waiting" in usable()
    with server.store.reading() as c:
        entries = [(entry.action, entry.subject, entry.reason) for entry in audit.list_(c, limit=3)]
    assert entries[0] == ("include", "group:g-waiting", "a test account")


def test_relabelling_revises_votes_and_keeps_what_people_said(server: RunningServer) -> None:
    done = decide(server, "relabel", ids=["g-waiting", "g-duel", "g-silent", "g-thumb", "g-tie"], label="B")
    assert (done["selected"], done["changed"]) == (5, 3)
    with server.store.reading() as c:
        history, counting = feedback.history(c, "g-waiting"), feedback.for_group(c, "g-waiting")
        own, duel = feedback.for_group(c, "g-silent"), feedback.history(c, "g-duel")
    assert [row.label for row in history] == [Label.A, Label.A, Label.B, Label.B, Label.B]
    assert {(row.rater_id, row.label, row.revision) for row in counting} >= {("ann", Label.B, 1), ("bob", Label.B, 1)}
    assert own[0].rater_id.startswith("expert:address:")
    assert len(duel) == 1
    compiled = pairs.compile_new(server.store, None, server.config, parent=0).compiled
    (pair,) = [pair for pair in compiled.pairs if isinstance(pair, PreferencePair) and "g-waiting" in pair.group_ids]
    assert pair.chosen.text == "100 % sure_thing"
    assert decide(server, "relabel", ids=["g-waiting"], label="B")["changed"] == 0


def test_a_group_sent_to_the_queue_is_shown_again_to_another_rater_once(server: RunningServer) -> None:
    names = (name for name in map("rater-{}".format, range(1000)) if pool_of(name, 0.2) is Pool.TRAIN)
    rater = next(names)

    def shown(who: str) -> str | None:
        item = server.http.get("/v1/queue", params={"rater_id": who}).json()["item"]
        return None if item is None else str(item["inference_id"])

    assert shown(rater) == "g-silent"  # the only one that nobody picked from
    decide(server, "enqueue", ids=["g-trained"])
    assert shown(rater) == "g-trained"
    pick = {"inference_id": "g-trained", "outcome": "chosen", "chosen_index": 1, "rejected_index": 0, "rater_id": rater}
    assert server.http.post("/v1/preferences", json=pick).status_code == 201
    assert [shown(rater), shown(next(names))] == ["g-silent", "g-silent"]
    decide(server, "enqueue", ids=["g-tie"])
    decide(server, "dequeue", ids=["g-tie"])
    assert shown(rater) == "g-silent"


def test_a_decision_needs_a_reason_and_one_selection(shop: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for body, param in (
        ({"ids": ["g-tie"]}, "reason"),
        ({"ids": ["g-tie"], "reason": ""}, "reason"),
        ({"reason": "x"}, "body"),
        ({"reason": "x", "ids": ["g-tie"], "filters": {}}, "body"),
        ({"reason": "x", "filters": {"state": "lost"}}, "filters.state"),
        ({"reason": "x", "ids": ["nobody"]}, "ids"),
    ):
        reply = shop.http.post("/v1/groups/exclude", json=body)
        assert reply.status_code in (400, 404), reply.text
        assert reply.json()["error"]["param"] == param
    assert ids_of(shop, Wanted(state=State.EXCLUDED)) == []
    monkeypatch.setattr(curate, "MAX_RELABELLED", 2)
    with pytest.raises(InvalidRequestError, match="narrow the filters"):
        curate.relabel(shop.store, shop.config, Selection(wanted=Wanted()), Label.A, Decision("me", "x"))


def test_views_are_kept_by_name_and_forgotten(shop: RunningServer) -> None:
    made = shop.http.post("/v1/views", json={"name": "Ann's <ties>", "filters": {"label": "TIE", "rater": "ann", "q": ""}})
    assert made.status_code == 201
    assert made.json()["filters"] == {"label": "TIE", "rater": "ann"}
    assert shop.http.post("/v1/views", json={"name": "Ann's <ties>", "filters": {"q": "x"}}).status_code == 409
    assert shop.http.post("/v1/views", json={"name": "all", "filters": {}}).status_code == 400
    text = shop.http.get("/preferences").text
    assert "Ann&#39;s &lt;ties&gt;" in text
    assert 'href="/preferences?label=TIE&amp;rater=ann"' in text
    shop.store.write(lambda c: saved_views.forget(c, {"bob"}))
    (view,) = shop.http.get("/v1/views").json()["data"]
    assert shop.http.delete(f"/v1/views/{view['id']}").json()["deleted"] is True
    assert shop.http.delete(f"/v1/views/{view['id']}").status_code == 404
    assert shop.http.get("/v1/views").json()["data"] == []


def test_an_erased_person_leaves_no_word_in_what_these_pages_keep(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    put_groups(server.store, *(a_group(f"g-{n}", answers=("a", "b"), policy=POLICY, user="ann") for n in ("tie", "pair")))
    put_picks(server.store, a_pick("g-tie", "ann", Label.TIE, feedback_id="f-tie"), a_pick("g-pair", "ann"))
    assert pairs.run(server.store, None, server.config, cycle_id=None, parent=0) is not None
    decide(server, "exclude", ids=["g-tie"], reason="Ann asked us to")
    server.http.post("/v1/views", json={"name": "v", "filters": {"rater": "ann"}})
    assert ids_of(server, Wanted(search="hello", reason="tie")) == ["tie"]
    reply = server.http.post("/v1/erasures", json={"user": "ann", "reason": "asked by mail"})
    assert reply.status_code == 201, reply.text
    assert ids_of(server, Wanted(search="hello")) == ids_of(server, Wanted()) == []
    assert server.http.get("/v1/views").json()["data"] == []
    page = server.http.get("/preferences/g-tie").text
    assert "The texts were erased" in page
    assert "Ann asked us to" not in page
    with server.store.reading() as c:
        assert set_aside.reasons(c, ["f-tie"]) == {}
        assert erasures.find(c, ["ann"]).is_empty


def test_a_dataset_leaves_its_reasons_where_they_can_be_asked_for(server: RunningServer) -> None:
    put_groups(server.store, *(a_group(f"g-more-{n}", answers=("a", "b"), policy=POLICY) for n in range(2)))
    put_picks(server.store, a_pick("g-more-0"), a_pick("g-more-1", label=Label.SKIP))
    dataset = pairs.run(server.store, None, server.config, cycle_id=None, parent=0)
    assert dataset is not None
    assert ids_of(server, Wanted(reason=Dropped.SKIP)) == ["more-1"]
    assert "more-0" in ids_of(server, Wanted(state=State.KEPT))
    with server.store.reading() as c:
        (why,) = set_aside.reasons(c, [row.feedback_id for row in feedback.history(c, "g-more-1")]).values()
    assert why == ("skip", dataset.dataset_id)
