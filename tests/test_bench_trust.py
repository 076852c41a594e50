"""Parts of `pairloop bench trust` in small: real servers under load, and figures that can tell a fault."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from tests.store_rows import a_group

from pairloop.bench import trust_loops, trust_swap
from pairloop.bench.trust import PARTS, TrustSettings, part
from pairloop.config import parse_config
from pairloop.statistics import binomial_tail
from pairloop.store import Store, groups
from pairloop.types import Completion, FinishReason, Group, GroupKind


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
