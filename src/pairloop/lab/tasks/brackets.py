"""Close what is open, innermost first: `([]{(>` is answered by `)})`. Exact match.

A fault of the corpus is a closing bracket of another kind, one too few, or one too many.
"""

from __future__ import annotations

import random

from pairloop.lab.tasks.base import BaseRecipe, CharacterTask, Problem

PARTNER = {"(": ")", "[": "]", "{": "}"}
LENGTH = 12
CLOSING_SHARE = 0.35
RIGHT_SHARE = 0.3


class Brackets(CharacterTask):
    name = "brackets"
    recipe = BaseRecipe(alphabet="()[]{}>", steps=800, max_tokens=LENGTH + 2)

    def problem(self, rng: random.Random) -> Problem:
        opened: list[str] = []
        text = ""
        for _ in range(LENGTH):
            if opened and rng.random() < CLOSING_SHARE:
                text += PARTNER[opened.pop()]
            else:
                opened.append(rng.choice(list(PARTNER)))
                text += opened[-1]
        return Problem(text + ">", "".join(PARTNER[bracket] for bracket in reversed(opened)))

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        """The closing brackets, or with one fault."""
        answer = list(problem.target)
        if rng.random() < RIGHT_SHARE:
            return "".join(answer)
        position = rng.randrange(len(answer) + 1)
        kind = rng.choice(("other", "other", "missing", "extra"))
        if kind == "extra" or position == len(answer):
            answer.insert(position, rng.choice(list(PARTNER.values())))
        elif kind == "missing":
            del answer[position]
        else:
            answer[position] = rng.choice([bracket for bracket in PARTNER.values() if bracket != answer[position]])
        return "".join(answer)

    def score(self, problem: Problem, answer: str) -> float:
        return float(answer == problem.target)
