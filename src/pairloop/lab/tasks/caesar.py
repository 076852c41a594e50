"""Move twenty letters three places on in the alphabet: `abz…>` is answered by `dec…`. Graded: the share of right places.

Each letter of the corpus is left as it was with probability .35, each on its own: almost no sample is wholly right or
wholly wrong, so of two samples the better one says little about any single letter.
"""

from __future__ import annotations

import random
import string

from pairloop.lab.tasks.base import BaseRecipe, CharacterTask, Problem, share_of_equal

LETTERS = string.ascii_lowercase
LENGTH = 20
SHIFT = 3
FAULT_SHARE = 0.35
MOVED = str.maketrans(LETTERS, LETTERS[SHIFT:] + LETTERS[:SHIFT])


class Caesar(CharacterTask):
    name = "caesar"
    learning_rate = 2e-3
    length = LENGTH
    fault_share = FAULT_SHARE
    recipe = BaseRecipe(alphabet=LETTERS + ">", steps=300, max_tokens=LENGTH + 4)

    def problem(self, rng: random.Random) -> Problem:
        text = "".join(rng.choices(LETTERS, k=self.length))
        return Problem(text + ">", text.translate(MOVED))

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        """The moved letters, some of them left as they were."""
        pairs = zip(problem.prompt[: self.length], problem.target, strict=True)
        return "".join(kept if rng.random() < self.fault_share else moved for kept, moved in pairs)

    def score(self, problem: Problem, answer: str) -> float:
        return share_of_equal(problem.target, answer)
