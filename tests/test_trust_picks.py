"""The measure of picks: its load, its databases, and that it sees what is lost, doubled or refused."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.server import RunningServer
from tests.store_rows import BOT, a_pick

from pairloop.bench import trust_picks
from pairloop.bench.servers import Server
from pairloop.bench.trust import TrustSettings
from pairloop.bench.trust_picks import HEADERS, RATER, Load
from pairloop.bench.trust_rows import add_groups, group_id
from pairloop.config import load_config
from pairloop.errors import SystemFailure
from pairloop.store import Store, doctor, feedback, groups

FIGURES: dict[str, Any] = {
    **{f"{key}_{clients}": value for clients in (32, 128) for key, value in (("per_s", 2_500.0), ("p50_ms", 9.0))},
    "p99_ms_32": 20.0,
    "p99_ms_128": 80.0,
    "cpu_ms_32": 0.2,
    "cpu_ms_128": 0.2,
    "p99_ms_32_x10": 22.0,
    "p99_growth_x10": 0.1,
    "acknowledged": 5,
    "lost": 0,
    "doubled": 0,
}


def test_without_a_compiler_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemFailure, match="there is no compiler"):
        Load(tmp_path)
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(SystemFailure, match="could not compile"):
        Load(tmp_path)


def test_the_rows_made_in_bulk_are_groups_like_others(tmp_path: Path) -> None:
    with Store.in_memory(tmp_path / "artifacts") as store:
        store.write(lambda c: add_groups(c, BOT, 0, 30))
        store.write(lambda c: add_groups(c, BOT, 30, 60, picked=True))
        with store.reading() as c:
            made = [groups.get(c, group_id(number)) for number in (0, 29, 30, 59)]
            assert all(group is not None and len(group.completions) == 2 for group in made)
            assert groups.get(c, group_id(60)) is None
            assert [len(feedback.for_group(c, group_id(number))) for number in (29, 30)] == [0, 1]
        assert doctor.check(store) == []


needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) is installed")


@needs_a_compiler
def test_what_is_lost_or_doubled_or_refused_is_counted(tmp_path: Path) -> None:
    trust_picks._fill(tmp_path / "small", 40)
    config = load_config(tmp_path / "small" / "state")
    load = Load(tmp_path)
    with RunningServer(tmp_path / "served") as server:
        server.store.write(lambda c: add_groups(c, "support-bot", 0, 40))
        found = load.run("small", Server(_own_pid(), server.url), 4, 30, groups=40)
        assert (found["acknowledged"], found["errors"]) == (30, 0)
        assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]
        with pytest.raises(SystemFailure, match=r"picks were not acknowledged, the first with status 404"):
            load.run("small", Server(_own_pid(), server.url), 4, 30, groups=4_000)
        answered = set(load.acknowledged["small"])
    with Store.open(config) as store:  # all but two of them, one of those twice, and one that nobody was told of
        kept = sorted(answered)[2:]
        for rater in (*kept, kept[0], f"{RATER}-untold"):
            store.write(partial(feedback.insert, row=a_pick(group_id(1), rater)))
    told = trust_picks._kept({"small": tmp_path / "small"}, load)
    assert told == {"acknowledged": len(answered), "lost": 2, "doubled": 1, "unanswered": 1}


def _own_pid() -> int:
    return int(Path("/proc/self").resolve().name)


def test_a_broken_promise_is_told() -> None:
    assert [row[-1] for row in trust_picks.rows(FIGURES)] == ["yes"] * 4
    assert all(len(row) == len(HEADERS) for row in trust_picks.rows(FIGURES))
    for key, bad in (("per_s_32", 999.0), ("p99_ms_128", 121.0), ("p99_growth_x10", 0.3), ("lost", 1)):
        assert [row[-1] for row in trust_picks.rows({**FIGURES, key: bad})].count("NO") == 1


@pytest.mark.slow
@needs_a_compiler
def test_under_load_no_pick_is_lost_or_doubled(tmp_path: Path) -> None:
    found = trust_picks.measure(TrustSettings(tmp_path, lambda *_: None, quick=True))
    assert (found["lost"], found["doubled"], found["unanswered"]) == (0, 0, 0)
    assert found["acknowledged"] == 4 * (400 + 400 + 600)
    assert 0 < found["cpu_ms_per_pick"] < 5
    assert found["per_s_128"] > 50
