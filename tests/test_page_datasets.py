"""Datasets: the list, a dataset's page, its rows page by page, and the rows as files."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server import RunningServer, user_of

from pairloop.errors import RowsError
from pairloop.formats import snapshot
from pairloop.loop import pairs
from pairloop.loop.pairs import Dropped
from pairloop.store import removed
from pairloop.types import Dataset, Message, PairSide, Pool, PreferencePair
from pairloop.web.pages.datasets import ROWS_ON_A_PAGE, reasons_of
from pairloop.web.words import WHY

EVIL = "<script>alert('x')</script></textarea>\u202egnp"


def pick(server: RunningServer, user: str, text: str, *, outcome: str = "chosen") -> str:
    reply = server.chat(user=user, n=2, messages=[{"role": "user", "content": text}]).json()
    pick = {"inference_id": reply["id"], "outcome": outcome, "latency_ms": 5_000, "shown_order": [0, 1]}
    given = server.http.post("/v1/preferences", json=pick | ({"chosen_index": 0} if outcome == "chosen" else {}))
    assert given.status_code == 201, given.text
    return str(reply["id"])


def compiled(server: RunningServer) -> Dataset:
    dataset = pairs.run(server.store, server.policy.tokens, server.config, cycle_id=None, parent=0)
    assert dataset is not None
    return dataset


def test_datasets_are_listed_read_and_taken_along(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    assert "No dataset yet" in server.http.get("/datasets").text
    asked = [f"{EVIL} {number}" for number in range(ROWS_ON_A_PAGE + 3)]
    groups = [pick(server, user_of(Pool.TRAIN, number), text) for number, text in enumerate(asked)]
    pick(server, user_of(Pool.TRAIN, 30), "a tie", outcome="tie")
    dataset = compiled(server)
    listed = server.http.get("/datasets").text
    assert f'href="/datasets/{dataset.dataset_id}"' in listed
    first = server.http.get(f"/datasets/{dataset.dataset_id}").text
    assert "<script>alert" not in first
    assert WHY[Dropped.TIE] in first
    assert 'class="filled" width="100.0"' in first
    at = first.split("&amp;at=")[1].split("#")[0]
    second = server.http.get(f"/datasets/{dataset.dataset_id}", params={"at": at}).text
    shown = [page.count('<article class="example">') for page in (first, second)]
    assert sum(shown) == dataset.n_train == len(asked) - identical(server, groups)
    for text in asked:
        assert (html.escape(text, quote=False).replace("'", "&#39;") in first + second) or identical(server, groups)
    for wrong in (int(at) - 1, 10**9, -1):
        refused = server.http.get(f"/datasets/{dataset.dataset_id}", params={"at": wrong})
        assert refused.status_code == 400
        assert "at" in refused.text
    assert server.http.get(f"/datasets/{dataset.dataset_id}?split=all").status_code == 400
    assert server.http.get("/datasets/nope").status_code == 404
    for split in ("train", "heldout"):
        taken = server.http.get(f"/v1/datasets/{dataset.dataset_id}/content", params={"split": split})
        assert taken.content == (Path(dataset.path) / f"{split}.jsonl").read_bytes()
        assert f"{split}.jsonl" in taken.headers["content-disposition"]
    assert server.http.get("/v1/datasets/nope/content").status_code == 404


def identical(server: RunningServer, group_ids: list[str]) -> int:
    """Of how many comparisons both answers are the same: they make no pair."""
    return sum(len({one.text for one in server.group(group_id).completions}) == 1 for group_id in group_ids)


def test_what_was_taken_out_of_a_dataset_is_said(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    for number in range(4):
        pick(server, user_of(Pool.TRAIN, number), f"question {number}")
    dataset = compiled(server)
    erased = server.http.post("/v1/erasures", json={"user": user_of(Pool.TRAIN, 0), "reason": "asked by mail"})
    assert erased.status_code < 300, erased.text
    page = server.http.get(f"/datasets/{dataset.dataset_id}").text
    assert "Rows were erased from it since" in page
    assert "question 0" not in page
    assert "question 0" not in server.http.get(f"/v1/datasets/{dataset.dataset_id}/content").text
    other = serve()
    pick(other, user_of(Pool.TRAIN, 1), "question 1")
    gone = compiled(other)
    with other.store.reading() as c:
        (path,) = c.exec_driver_sql("SELECT path FROM datasets").scalars()
    other.store.write(lambda c: removed.mark(c, path, removed.Why.RETENTION, gone.created_at))
    page = other.http.get(f"/datasets/{gone.dataset_id}").text
    assert "Its rows were removed" in page
    assert other.http.get(f"/v1/datasets/{gone.dataset_id}/content").status_code == 404


def test_reasons_come_with_their_words_the_most_frequent_first() -> None:
    tie, other = reasons_of({Dropped.SKIP: 1, "a_new_one": 0, Dropped.TIE: 4})
    assert (tie.rows, tie.share, other.share) == (4, 1.0, 0.25)
    assert reasons_of({}) == []


@settings(max_examples=10, deadline=None)
@given(texts=st.lists(st.text(max_size=40), max_size=8), limit=st.integers(1, 5), wrong=st.integers(1, 400))
def test_rows_read_by_pages_are_the_rows(texts: list[str], limit: int, wrong: int) -> None:
    rows = [PreferencePair(f"p{n}", (Message("user", text),), PairSide(text), PairSide("no")) for n, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        snapshot.write(path, rows)
        found, at, begins = [], 0, {0}
        while True:
            page, after = snapshot.read_page(path, at, limit)
            found += page
            if after is None:
                break
            at = after
            begins.add(at)
        assert found == rows
        content = path.read_bytes()
        begins |= {n + 1 for n, byte in enumerate(content[:-1]) if byte == ord("\n")}
        if wrong not in begins:
            with pytest.raises(ValueError, match="no row begins"):
                snapshot.read_page(path, wrong, limit)
        path.write_text('{"no": "row"}\n')
        with pytest.raises(RowsError):
            snapshot.read_page(path, 0, limit)
