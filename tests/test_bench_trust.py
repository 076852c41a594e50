"""Parts of `pairloop bench trust` in small: real servers under load, and figures that can tell a fault."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection
from tests.store_rows import NOW, a_cycle, a_group, a_pick, put_groups, put_picks

from pairloop.bench import trust_kills, trust_loops, trust_soak, trust_swap
from pairloop.bench.trust import PARTS, TrustSettings, part
from pairloop.config import parse_config
from pairloop.statistics import binomial_tail
from pairloop.store import Store, cycles, groups
from pairloop.types import Completion, CycleState, CycleStep, FinishReason, Group, GroupKind


def quick(folder: Path) -> TrustSettings:
    return TrustSettings(folder, lambda *_: None, quick=True, duels=100)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swap", "soak"])
def test_a_part_measures_and_is_told_in_a_table(tmp_path: Path, name: str) -> None:
    found = part(name).measure(quick(tmp_path))
    assert found["failed"] == 0, found["failures"]
    assert found["requests"] > 100
    if name == "swap":
        assert (found["mixed"], found["one_sided_duels"]) == (0, 0)
        assert found["duel_groups"] > 0
    else:
        assert found["problems"] == []
        assert found["cycles"] > 0
    (row,) = part(name).rows(found)
    assert len(row) == len(part(name).headers)


def test_planted_fault_groups_that_mix_versions_are_counted(tmp_path: Path) -> None:
    config = parse_config({"state_dir": tmp_path, "policy": {"model": "fake", "method": "full"}})
    with Store.open(config) as store:
        for number, kind in enumerate((GroupKind.TRAIN, GroupKind.HELDOUT, GroupKind.TRAIN)):
            versions = (0, 0) if number == 2 else (0, 1)
            group = _group(f"g{number}", kind, versions)
            store.submit(partial(groups.insert, group=group)).result()
        assert trust_swap.count_mixed(store, config) == (2, 0, 0)


def test_planted_fault_picks_that_are_lost_doubled_or_changed_are_counted(tmp_path: Path) -> None:
    config = parse_config({"state_dir": tmp_path, "policy": {"model": "fake", "method": "full"}})
    with Store.open(config) as store:
        put_groups(store, a_group("1"), a_group("2"))
        ids = [group.group_id for group in (a_group("1"), a_group("2"))]
        put_picks(
            store,
            a_pick(ids[0], feedback_id="kept"),
            a_pick(ids[1], feedback_id="changed"),
            a_pick(ids[1], feedback_id="doubled", rater="sam"),
        )
    told = {"kept": (ids[0], 0), "changed": (ids[1], 1), "lost": (ids[0], 0)}
    found = trust_kills.count(config, trust_kills.Tally(told))
    assert (found["acknowledged"], found["lost"], found["doubled"], found["changed"]) == (3, 1, 1, 1)
    assert len(trust_kills.rows({**found, "kills": 1, "sent_again": 0})[0]) == len(trust_kills.HEADERS)


def test_every_cycle_of_a_soak_is_counted(tmp_path: Path) -> None:
    config = parse_config({"state_dir": tmp_path, "policy": {"model": "fake", "method": "full"}})
    with Store.open(config) as store:

        def many(c: Connection) -> None:
            for number in range(1, 131):
                cycles.insert(c, a_cycle(number, "bot"))
                cycles.step(c, f"cycle_bot_{number}", CycleStep(CycleState.PROMOTED, {}, NOW))
            cycles.insert(c, a_cycle(131, "bot"))

        store.write(many)
        assert trust_soak.ends_of_cycles(store, "bot") == {"promoted": 130, "building": 1}


@pytest.mark.parametrize(("rss_mb", "growth"), [([60.0] + 9 * [100.0], 0), ([60.0 + 2 * n for n in range(10)], 12)])
def test_growth_is_measured_after_the_first_tenth_and_told_as_measured(rss_mb: list[float], growth: int) -> None:
    first, last = trust_soak.thirds(rss_mb)
    assert last - first == growth
    found = {
        "minutes": 30.0,
        "requests": 9,
        "failed": 0,
        "cycles": 1,
        "ends": {},
        "rss_mb": rss_mb,
        "p99_ms": [],
        "problems": [],
    }
    assert f"{first:.1f} → {last:.1f}" in trust_soak.rows(found)[0]


def _group(group_id: str, kind: GroupKind, versions: tuple[int, int]) -> Group:
    answers = tuple(Completion("hi", (1,), (-0.5,), version, FinishReason.STOP) for version in versions)
    return a_group(group_id, policy="support-bot", kind=kind, completions=answers)


def test_the_bound_of_random_loops_is_that_of_the_binomial() -> None:
    assert trust_loops.bound(80, 0.05) == 8
    assert binomial_tail(9, 80, 0.05) < 0.025 <= binomial_tail(8, 80, 0.05)


def test_every_part_is_known() -> None:
    assert all(len(part(name).headers) > 3 for name in PARTS)
    with pytest.raises(ValueError, match="no part 'x'"):
        part("x")
