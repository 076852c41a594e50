"""Datasets out over HTTP, as JSON lines (tests/test_trl_parity.py has TRL train on them)."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from tests.server import POLICY, RunningServer

from pairloop.formats import FORMATS, snapshot, write_rows
from pairloop.store import datasets
from pairloop.types import Dataset, Message, PairSide, PreferencePair, TrainingGroup, TrainingRow

PAIRS = [
    PreferencePair(f"pair_{n}", (Message("user", f"What is {n}?"),), PairSide(f"It is {n}."), PairSide("No idea."))
    for n in range(8)
]
DEMONSTRATION = TrainingGroup("row_1", (Message("user", "Hi"),), (PairSide("Hello!"),))


def _with_dataset(server: RunningServer, rows: list[TrainingRow], folder: Path) -> str:
    folder.mkdir()
    snapshot.write(folder / snapshot.TRAIN_FILE, rows)
    dataset = Dataset("dataset_1", POLICY, str(folder), len(rows), 0, {}, {}, datetime.now(UTC))
    server.store.write(lambda c: datasets.insert(c, dataset, feedback_seq=0, cycle_id=None, pairs=[]))
    return f"/v1/datasets/{dataset.dataset_id}/export"


def test_a_dataset_streams_out_in_every_format_that_holds_it(serve: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = serve()
    path = _with_dataset(server, [*PAIRS], tmp_path / "data")
    for name in FORMATS:
        response = server.http.post(path, params={"format": name})
        if name in ("thumbs", "sft"):
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, "format")
            assert "cannot hold 8 of 8 rows (preference 8)" in error["message"]
            continue
        assert (response.status_code, response.headers["content-type"]) == (200, "application/jsonl")
        write_rows(tmp_path / "rows.jsonl", PAIRS, name)
        assert response.content == (tmp_path / "rows.jsonl").read_bytes()
    unknown = server.http.post(path, params={"format": "csv"}).json()["error"]
    assert (unknown["param"], unknown["type"]) == ("format", "invalid_request_error")
    assert server.http.post("/v1/datasets/none/export").status_code == 404


def test_what_a_format_cannot_hold_is_left_out_only_when_asked(serve: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = serve()
    path = _with_dataset(server, [*PAIRS, DEMONSTRATION], tmp_path / "data")
    refused = server.http.post(path, params={"format": "trl"})
    assert refused.status_code == 400
    assert "1 of 9 rows (demonstration 1)" in refused.json()["error"]["message"]
    kept = server.http.post(path, params={"format": "trl", "skip_refused": True})
    assert len(kept.text.splitlines()) == 8
    alone = server.http.post(path, params={"format": "sft", "skip_refused": True})
    assert [json.loads(line) for line in alone.text.splitlines()] == [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    ]
