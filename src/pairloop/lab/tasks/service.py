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
    recipe = BaseRecipe(alphabet=LETTERS + LETTERS.upper() + "+!. >", steps=1200, max_tokens=96)
