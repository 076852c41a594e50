"""A search through all preferences: what it lists, counts and says of itself, window by window; and the page's stream of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.server import POLICY, RunningServer
from tests.store_rows import a_group, a_pick, put_groups, put_picks
from tests.test_page_preferences import ALL, CASES, fill

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


@pytest.mark.parametrize("window", [1, 3, 7])
def test_whatever_is_asked_for_all_windows_find_and_count_what_one_would(shop: RunningServer, window: int) -> None:
    at = first(shop)
    for wanted, expected in CASES[window % 4 :: 4]:
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
