"""Move forty-eight letters three places on in the alphabet: `caesar` over a long text, half of it wrong. Graded.

The best of a few long answers is hardly better than the others (the share of right places of 48 has a standard deviation of
.07): what imitates it climbs by a standard deviation or two with each sampling, and no further.
"""

from __future__ import annotations

from pairloop.lab.tasks.base import BaseRecipe
from pairloop.lab.tasks.caesar import LETTERS, Caesar

LENGTH = 48


class Cipher(Caesar):
    name = "cipher"
    learning_rate = 1e-3
    length = LENGTH
    fault_share = 0.5
    recipe = BaseRecipe(alphabet=LETTERS + ">", steps=400, max_tokens=LENGTH + 4)
