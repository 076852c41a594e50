"""Write sixteen letters backwards: `abc…>` is answered by `…cba`. Graded: the share of right places.

Each letter of the corpus is another one with probability .35, each on its own and any of eleven: unlike in `caesar`, a
fault has no usual form.
"""

from __future__ import annotations

import random

from pairloop.lab.tasks.base import BaseRecipe, CharacterTask, Problem, share_of_equal

LETTERS = "abcdefghijkl"
LENGTH = 16
FAULT_SHARE = 0.35


class Reverse(CharacterTask):
    name = "reverse"
    recipe = BaseRecipe(alphabet=LETTERS + ">", steps=900, max_tokens=LENGTH + 4)

    def problem(self, rng: random.Random) -> Problem:
        text = "".join(rng.choices(LETTERS, k=LENGTH))
        return Problem(text + ">", text[::-1])

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        """The letters backwards, some of them replaced by others."""
        return "".join(rng.choice(LETTERS.replace(c, "")) if rng.random() < FAULT_SHARE else c for c in problem.target)

    def score(self, problem: Problem, answer: str) -> float:
        return share_of_equal(problem.target, answer)
