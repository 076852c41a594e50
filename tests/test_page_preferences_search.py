"""A search through all preferences: what it lists, counts and says of itself, window by window; and the page's stream of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html import unescape
from typing import Any

import pytest
from tests.server import POLICY, RunningServer
from tests.store_rows import a_group, a_pick, put_groups, put_picks
from tests.test_page_preferences import ALL, CASES, EVIL, fill

from pairloop.bench.trust_rows import add_groups
from pairloop.store import preferences, searches
from pairloop.store.preferences import Place, Wanted
from pairloop.store.searches import SoFar


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Filled, and only looked at."""
    with RunningServer(tmp_path_factory.mktemp("shop") / "server") as made:
        fill(made)
        yield made


def first(server: RunningServer) -> Place:
    with server.store.reading() as c:
        return preferences.first(c, POLICY)


def searched(server: RunningServer, wanted: Wanted, at: Place, room: int, window: int) -> list[SoFar]:
    return list(searches.through_all(server.store, POLICY, wanted, at, room, window))


@pytest.mark.parametrize("window", [2, 7])
def test_whatever_is_asked_for_all_windows_find_and_count_what_one_would(shop: RunningServer, window: int) -> None:
    at = first(shop)
    for wanted, expected in CASES[window % 5 :: 5]:
        with shop.store.reading() as c:
            whole = preferences.counted(c, POLICY, wanted, at)
        steps = searched(shop, wanted, at, 50, window)
        assert [group_id.removeprefix("g-") for step in steps for group_id in step.new] == expected, wanted
        assert steps[-1].counted == whole, wanted
        assert steps[-1].next is None
        assert {step.there_are for step in steps} == {whole.looked}
        assert [step.counted.looked for step in steps] == sorted(step.counted.looked for step in steps)


def test_a_full_page_stops_its_list_and_the_next_begins_behind_it(shop: RunningServer) -> None:
    for window, room in ((1, 3), (2, 3), (3, 2), (50, 4)):
        at: Place | None = first(shop)
        found: list[str] = []
        while at is not None and len(found) < len(ALL):
            steps = searched(shop, Wanted(), at, room, window)
            part = [group_id.removeprefix("g-") for step in steps for group_id in step.new]
            assert len(part) <= room
            assert steps[-1].counted.groups == len(ALL)  # counted to the end all the same
            found += part
            at = steps[-1].next
        assert found == ALL, (window, room)
    assert all(step.new == [] for step in searched(shop, Wanted(), first(shop), 0, 2))


def streamed(server: RunningServer, address: str) -> list[dict[str, Any]]:
    """What a page would be told: each step's rows and parts, and that it ended."""
    *steps, last = server.http.get(address).raise_for_status().text.rstrip("\n").split("\n\n")
    assert last == "event: end\ndata: {}"
    return [json.loads(step.removeprefix("event: found\ndata: ")) for step in steps]


def test_the_stream_says_what_stands_where_and_hostile_text_stays_text(shop: RunningServer) -> None:
    place = f"{first(shop).top}-{first(shop).before}"
    (step,) = streamed(shop, f"/preferences/search?at={place}")
    assert step["rows"].count("data-tick=") == len(ALL)
    assert "<script>alert" not in step["rows"]
    assert EVIL in unescape(step["rows"])
    assert set(step["parts"]) == {"found-head", "found-facets", "found-foot", "searched"}
    assert "Looked through all 7 groups, 7 found." in step["parts"]["searched"]
    (step,) = streamed(shop, f"/preferences/search?at={place}&q=parcel&limit=1&shown=1")  # its page is full: it counts alone
    assert step["rows"].strip() == ""
    assert "1 group<" in step["parts"]["found-head"]
    assert "found-foot" not in step["parts"]
    (step,) = streamed(shop, f"/preferences/search?at={place}&limit=3")
    assert step["rows"].count("data-tick=") == 3
    assert "Older" in step["parts"]["found-foot"]
    for query, name in (("", "at"), ("at=12", "at"), ("at=1-2&shown=-1", "shown"), ("at=1-2&state=lost", "state")):
        page = shop.http.get(f"/preferences/search?{query}")
        assert page.status_code == 400
        assert name in page.text


def bury(server: RunningServer, rows: int) -> None:
    """One group that asks for a zebra, the oldest of so many with a pick."""
    put_groups(server.store, a_group("g-zebra", answers=("stripes", "spots"), policy=POLICY))
    put_picks(server.store, a_pick("g-zebra", "ann", feedback_id="f-zebra"))
    server.store.write(lambda c: add_groups(c, POLICY, 0, rows, picked=True))


@pytest.mark.sqlite("its rows are made inside SQLite")
def test_a_page_that_stops_before_the_end_says_how_to_go_on(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    bury(server, preferences.WINDOW + 100)
    text = server.http.get("/preferences?q=stripes").text
    assert "0 groups among the newest 5,000" in text
    assert "data-auto" in text
    older, search = (
        unescape(found) for found in re.findall(r'"(/preferences(?:/search)?\?[^"]*(?:after|at)=[^"]*)"', text)[::-1][:2]
    )
    assert "stripes" in server.http.get(older).text  # without JavaScript
    steps = streamed(server, search)
    assert [step["rows"].count("data-tick=") for step in steps] == [0, 1]
    assert "Looked through 5,000 of 5,101 groups, 0 found." in steps[0]["parts"]["searched"]
    assert "Looked through all 5,101 groups, 1 found." in steps[1]["parts"]["searched"]
    assert "1 group<" in steps[1]["parts"]["found-head"]
    assert "look further back" not in steps[1]["parts"]["found-foot"]
    reply = server.http.get("/v1/groups/export", params={"q": "stripes"})  # goes through all by itself
    assert (reply.headers["x-pairloop-groups"], reply.text.count("\n")) == ("1", 1)
    full = server.http.get("/preferences?limit=1").text  # a full page counts on when it is asked to
    assert "data-search" in full
    assert "data-auto" not in full
    last = server.http.get("/preferences?after=5101-20").text  # at the end of its list, it has but to count
    assert last.count("data-tick=") == 19
    (search,) = (unescape(found) for found in re.findall(r'"(/preferences/search[^"]*)"', last))
    steps = streamed(server, search)
    assert [step["rows"].strip() for step in steps] == ["", ""]
    assert "5,101 groups" in steps[-1]["parts"]["found-head"]
    assert "Older" not in steps[0]["parts"]["found-foot"]
