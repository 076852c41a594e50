"""Mini-countdown: reach the target from three numbers: `7,3,2=8>` is answered by `7+3+2=12;7+3-2=8`.

The answer tries expressions one after the other, each with its value, and ends at the one that reaches the target. Exact: the
last expression must use each number once and have the target as its value, whatever was written before it. The corpus
has two faults, try by try: a number misread, and a wrong value: the target where it is not reached (so the search ends
too soon), one off where it is.
"""

from __future__ import annotations

import random
import re
from itertools import product

from pairloop.lab.tasks.base import BaseRecipe, CharacterTask, Problem

DIGITS = "123456789"
NUMBERS = 3
MISREAD, WRONG_VALUE = 0.35, 0.2
"""Shares of tries; about four answers in ten are then right."""


class Countdown(CharacterTask):
    name = "countdown"
    learning_rate = 6e-4
    recipe = BaseRecipe(alphabet="0" + DIGITS + "+-,=;>", steps=1000, max_tokens=40)

    def problem(self, rng: random.Random) -> Problem:
        numbers = rng.choices(DIGITS, k=NUMBERS)
        target = rng.choice(sorted({value for text in _expressions(numbers) if (value := value_of(text)) > 0}))
        return Problem(f"{','.join(numbers)}={target}>", f"{','.join(numbers)}={target}")

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        """The search through the signs in a fixed order, until a value, right or wrong, is the target."""
        numbers, target = _read(problem)
        tried = []
        for text in _expressions(numbers):
            text = _misread(text, rng) if rng.random() < MISREAD else text
            value = value_of(text)
            if rng.random() < WRONG_VALUE:
                value = target if value != target else target + rng.choice((-1, 1))
            tried.append(f"{text}={value}")
            if value == target:
                break
        return ";".join(tried)

    def score(self, problem: Problem, answer: str) -> float:
        numbers, target = _read(problem)
        last = answer.split(";")[-1].split("=")[0]
        is_legal = re.fullmatch(r"[1-9]([-+][1-9])*", last) is not None
        return float(is_legal and sorted(last[::2]) == sorted(numbers) and value_of(last) == target)


def value_of(expression: str) -> int:
    """The value of one-digit numbers joined by plus and minus signs."""
    return sum(int(term) for term in re.findall(r"[-+]?\d", expression))


def _expressions(numbers: list[str]) -> list[str]:
    """All choices of signs between the numbers as they stand."""
    first, *rest = numbers
    signs = product("+-", repeat=len(rest))
    return [first + "".join(sign + number for sign, number in zip(chosen, rest, strict=True)) for chosen in signs]


def _misread(text: str, rng: random.Random) -> str:
    position = 2 * rng.randrange(NUMBERS)
    return text[:position] + rng.choice(DIGITS.replace(text[position], "")) + text[position + 1 :]


def _read(problem: Problem) -> tuple[list[str], int]:
    numbers, _, target = problem.target.partition("=")
    return numbers.split(","), int(target)
