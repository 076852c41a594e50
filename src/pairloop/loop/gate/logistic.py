"""Logistic regression of a few terms, by Newton's method; standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

Row = tuple[tuple[float, ...], bool]

_STEPS = 50
_CLOSE = 1e-9


@lru_cache(maxsize=4)
def fit(rows: tuple[Row, ...], ridge: float) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Weights and their variances (the diagonal of the inverse information); None where Newton's method does not settle.

    Remembered for the last few: a verdict, its table of rules and its page ask the same of the same votes.

    rows: terms and whether the event happened. ``ridge``: the precision of a normal prior around 0, which keeps the fit finite.
    """
    size = len(rows[0][0])
    weights = [0.0] * size
    for _ in range(_STEPS):
        information = [[ridge * (i == j) for j in range(size)] for i in range(size)]
        slope = [-ridge * weight for weight in weights]
        for terms, happened in rows:
            p = 1 / (1 + math.exp(-max(-700.0, min(700.0, sum(w * x for w, x in zip(weights, terms, strict=True))))))
            for i, x in enumerate(terms):
                slope[i] += x * (happened - p)
                for j, y in enumerate(terms):
                    information[i][j] += x * y * p * (1 - p)
        inverse = _inverse(information)
        if inverse is None:
            return None
        step = [sum(a * b for a, b in zip(line, slope, strict=True)) for line in inverse]
        longest = max(map(abs, step))
        scale = min(1.0, 2.0 / longest) if longest else 1.0  # a Newton step from afar can overshoot for ever
        weights = [weight + scale * one for weight, one in zip(weights, step, strict=True)]
        if longest < _CLOSE:
            return tuple(weights), tuple(inverse[i][i] for i in range(size))
    return None


def _inverse(matrix: Sequence[Sequence[float]]) -> list[list[float]] | None:
    """By Gauss and Jordan with the largest pivot; None where the matrix is singular to machine precision."""
    size = len(matrix)
    rows = [[*line, *(float(i == j) for j in range(size))] for i, line in enumerate(matrix)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda i: abs(rows[i][column]))
        if abs(rows[pivot][column]) < 1e-300:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for i in range(size):
            if i != column:
                factor = rows[i][column]
                rows[i] = [value - factor * own for value, own in zip(rows[i], rows[column], strict=True)]
    return [line[size:] for line in rows]
