"""Sort six digits: `402217>` is answered by `012247`. Exact match; three answers in ten of the corpus are right."""

from __future__ import annotations

import random

from pairloop.lab.tasks.base import BaseRecipe, CharacterTask, Problem

DIGITS = "0123456789"
LENGTH = 6
RIGHT_SHARE = 0.3
MOST_FAULTS = 2


class Sort(CharacterTask):
    name = "sort"
    learning_rate = 6e-4
    recipe = BaseRecipe(alphabet=DIGITS + ">", steps=250, batch_size=64, max_tokens=LENGTH + 1)

    def problem(self, rng: random.Random) -> Problem:
        digits = rng.choices(DIGITS, k=LENGTH)
        return Problem("".join(digits) + ">", "".join(sorted(digits)))

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        """The sorted digits, or with one or two of them replaced by others."""
        answer = list(problem.target)
        if rng.random() >= RIGHT_SHARE:
            for position in rng.sample(range(LENGTH), rng.randint(1, MOST_FAULTS)):
                answer[position] = rng.choice(DIGITS.replace(answer[position], ""))
        return "".join(answer)

    def score(self, problem: Problem, answer: str) -> float:
        return float(answer == problem.target)
