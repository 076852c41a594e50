"""Add two three-digit numbers on a scratchpad: `478+256>` is answered by `14,13,7=734`.

The scratchpad is the sum of each column from the right, with what the column before carried. Exact match of what stands
after the `=`; the scratchpad itself is not scored. A fault of the corpus is a column one off, which the columns after it
and the result then carry on.
"""

from __future__ import annotations

import random

from pairloop.lab.tasks.base import BaseRecipe, CharacterTask, Problem

DIGITS = "0123456789"
COLUMNS = 3
FAULT_SHARE = 0.33
"""Of columns: about three answers in ten are then right."""


class Addition(CharacterTask):
    name = "addition"
    learning_rate = 6e-4
    recipe = BaseRecipe(alphabet=DIGITS + "+,=>", steps=800, max_tokens=20)

    def problem(self, rng: random.Random) -> Problem:
        left, right = rng.randrange(10**COLUMNS), rng.randrange(10**COLUMNS)
        return Problem(f"{left:0{COLUMNS}}+{right:0{COLUMNS}}>", str(left + right))

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        """Scratchpad and result, with columns that are one too much or too little."""
        left, right = problem.prompt.removesuffix(">").split("+")
        columns, carry = [], 0
        for a, b in zip(reversed(left), reversed(right), strict=True):
            fault = rng.choice((-1, 1)) if rng.random() < FAULT_SHARE else 0
            columns.append(max(0, int(a) + int(b) + carry + fault))
            carry = columns[-1] // 10
        result = int("".join([str(columns[-1]), *(str(column % 10) for column in reversed(columns[:-1]))]))
        return f"{','.join(map(str, columns))}={result}"

    def score(self, problem: Problem, answer: str) -> float:
        return float(answer.partition("=")[2] == problem.target)
