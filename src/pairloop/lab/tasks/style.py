"""Serve five letters, each by a clause: `dgk…>` is best answered by `D+ G+ K+ …`. Graded: a utility with penalties.

A clause is a letter and marks. Points per letter: +.6 its capital, +.4 a `+` (polite); −.4 a `!` (rude), −.1 per `.`
(filler), −.4 per clause said again, −.5 per clause too many; the mean over the letters, 0 at least. The faults of the corpus
come clause by clause, each on its own, and some make the answer longer: here bad answers differ in length as well.
"""

from __future__ import annotations

import random

from pairloop.lab.tasks.base import BaseRecipe, CharacterTask, Problem

LETTERS = "abcdefghijkl"
LENGTH = 5
WRONG_LETTER, NOT_POLITE, RUDE, FILLER, REPEATS = 0.25, 0.35, 0.25, 0.2, 0.06
MOST_DOTS = 3


class Style(CharacterTask):
    name = "style"
    length = LENGTH
    recipe = BaseRecipe(alphabet=LETTERS + LETTERS.upper() + "+!. >", steps=800, max_tokens=48)

    def problem(self, rng: random.Random) -> Problem:
        letters = "".join(rng.sample(LETTERS, self.length))
        return Problem(letters + ">", letters)

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        """A clause per letter, each with faults of its own."""
        return " ".join(_clause(letter, rng) for letter in problem.target)

    def score(self, problem: Problem, answer: str) -> float:
        points, before, due = 0.0, "", list(problem.target.upper())
        for clause in answer.split(" "):
            if due and (clause != before or clause[:1] == due[0]):
                points += 0.6 * (clause[:1] == due.pop(0)) + 0.4 * ("+" in clause)
                points -= 0.4 * ("!" in clause) + 0.1 * clause.count(".")
            else:
                points -= 0.4 if clause == before else 0.5
            before = clause
        return max(0.0, points / len(problem.target))


def _clause(letter: str, rng: random.Random) -> str:
    said = rng.choice(LETTERS.replace(letter, "")) if rng.random() < WRONG_LETTER else letter
    polite = "" if rng.random() < NOT_POLITE else "+"
    rude = "!" if rng.random() < RUDE else ""
    filler = "." * rng.randint(1, MOST_DOTS) if rng.random() < FILLER else ""
    clause = said.upper() + polite + rude + filler
    return f"{clause} {clause}" if rng.random() < REPEATS else clause
