"""R12's pairs differ in exactly one token, and its judge reads every seed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from pairloop.lab.bases import load
from pairloop.lab.claims.displacement import judge, near_duplicates
from pairloop.lab.tasks.base import training_problem
from pairloop.lab.tasks.caesar import Caesar


class Quick(Caesar):
    name = "quick"
    recipe = replace(Caesar.recipe, steps=20)


def test_pairs_differ_in_one_token_that_the_chosen_has_right(tmp_path: Path) -> None:
    task = Quick()
    pairs = near_duplicates(task, load(task, tmp_path), 20, training_problem, random.Random(0), "p")
    assert len({pair.group_id for pair in pairs}) == 20
    for pair in pairs:
        chosen, rejected = (completion.token_ids for completion in pair.completions)
        assert len(chosen) == len(rejected)
        assert sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1


def rows(plain: float, guarded: float) -> list[dict[str, object]]:
    return [
        {"guard": guard, "seed": 0, "d_chosen_per_token": value, "d_rejected_per_token": -1.0}
        for guard, value in (("plain DPO", -2.0), ("plain DPO", plain), ("DPO + NLL 1", -0.01), ("DPO + NLL 1", guarded))
    ]


def test_the_worst_seed_decides() -> None:
    assert judge({"rows": rows(-0.5, -0.09)}).passed is True
    assert judge({"rows": rows(0.01, -0.09)}).passed is False
    assert judge({"rows": rows(-0.5, -0.11)}).passed is False
    assert judge({"rows": []}).passed is None
