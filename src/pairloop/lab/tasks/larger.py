"""Write the larger of each two digits: of `1750…,2391…>` the answer is `2791…`. Graded: the share of right places of forty.

A fault of the corpus is the smaller digit, three times in five, each place on its own. As in `cipher`, the best of a few
answers is hardly better than the others.
"""

from __future__ import annotations

import random

from pairloop.lab.tasks.base import BaseRecipe, CharacterTask, Problem, share_of_equal

DIGITS = "0123456789"
LENGTH = 40
FAULT_SHARE = 0.6


class Larger(CharacterTask):
    name = "larger"
    recipe = BaseRecipe(alphabet=DIGITS + ",>", steps=800, max_tokens=LENGTH + 4)

    def problem(self, rng: random.Random) -> Problem:
        pairs = [rng.sample(DIGITS, 2) for _ in range(LENGTH)]
        rows = ["".join(row) for row in zip(*pairs, strict=True)]
        return Problem(f"{rows[0]},{rows[1]}>", "".join(map(max, pairs)))

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        """The larger digits, many of them replaced by the smaller one."""
        pairs = zip(*problem.prompt.removesuffix(">").split(","), strict=True)
        return "".join(min(pair) if rng.random() < FAULT_SHARE else max(pair) for pair in pairs)

    def score(self, problem: Problem, answer: str) -> float:
        return share_of_equal(problem.target, answer)
