"""Serve twelve letters, each by a clause: `style` over a long request. Graded: a utility with penalties.

As in `cipher`, an answer has so many parts that the best of a few is hardly better than the others.
"""

from __future__ import annotations

from pairloop.lab.tasks.base import BaseRecipe
from pairloop.lab.tasks.style import LETTERS, Style

LENGTH = 12


class Service(Style):
    name = "service"
    learning_rate = 1e-3
    length = LENGTH
    recipe = BaseRecipe(
        alphabet=LETTERS + LETTERS.upper() + "+!. >",
        hidden=64,
        layers=2,
        heads=4,
        mlp=192,
        steps=1200,
        batch_size=32,
        learning_rate=0.02,
        max_tokens=96,
    )
