"""Preferences of a full store: no look may read more than its window, whatever was trained and left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.store_rows import BOT, NOW
from tests.stores import open_store

from pairloop.bench.trust_rows import add_groups
from pairloop.store import Store, outcomes, preferences
from pairloop.store.preferences import State, Wanted

pytestmark = [pytest.mark.slow, pytest.mark.sqlite("its plans, and rows made inside it")]

GROUPS, TRAINED = 60_000, 30_000
MOST_S = 1.0
"""CPU of one look; 0.1 to 0.2 as it should be, minutes where a plan begins at the wrong end."""
LOOKS = [
    Wanted(),
    Wanted(search="zebra"),
    Wanted(search='warehouse "on monday"'),
    Wanted(search="größe"),
    Wanted(label="TIE"),
    Wanted(rater="customer-7"),
    Wanted(reason="tie"),
    Wanted(version=3),
    Wanted(pool="train", kind="train", source="human"),
    *(Wanted(state=state) for state in State),
]


def fill(c: Any) -> None:
    """All picked from; the older half in one dataset with a version, a sixth left out."""
    add_groups(c, BOT, 0, GROUPS, picked=True)
    for sql in (
        f"INSERT INTO datasets SELECT 'data_1', '{BOT}', NULL, '/x', 1, 0, '{{}}', '{{}}', 1, created_at FROM groups LIMIT 1",
        f"INSERT INTO pair_groups SELECT 'pair_' || group_id, group_id FROM feedback ORDER BY seq LIMIT {TRAINED}",
        f"INSERT INTO pair_feedback SELECT 'pair_' || group_id, feedback_id FROM feedback ORDER BY seq LIMIT {TRAINED}",
        "INSERT INTO dataset_pairs SELECT 'data_1', pair_id FROM pair_groups",
        f"INSERT INTO set_aside SELECT feedback_id, 'data_1', 'tie' FROM feedback ORDER BY seq LIMIT 10000 OFFSET {TRAINED}",
        "INSERT INTO versions (policy, number, kind, path, artifact_hash, dataset_id, created_at) "
        f"SELECT '{BOT}', 1, 'full', '/y', 'h', 'data_1', created_at FROM groups LIMIT 1",
    ):
        c.exec_driver_sql(sql)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with open_store(tmp_path_factory.mktemp("large") / "artifacts") as made:
        made.write(fill)
        yield made


@pytest.mark.parametrize("back", [0, TRAINED])
@pytest.mark.parametrize("wanted", LOOKS, ids=str)
def test_a_look_is_bounded(store: Store, wanted: Wanted, back: int) -> None:
    with store.reading() as c:
        at = preferences.first(c, BOT)
        at = at._replace(before=at.before - back)
        began = time.process_time()
        preferences.page(c, BOT, wanted, at, 50)
        preferences.counted(c, BOT, wanted, at)
        assert time.process_time() - began < MOST_S


def test_the_funnel_is_bounded(store: Store) -> None:
    with store.reading() as c:
        began = time.process_time()
        found = outcomes.funnel(c, BOT, NOW.replace(month=1, day=1, hour=0), NOW)
        assert time.process_time() - began < MOST_S
    assert (found.served, found.is_cut) == (outcomes.NEWEST, True)
