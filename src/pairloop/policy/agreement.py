"""Do two forward passes agree, token by token? The rule for engines at start-up and for the learner before step 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}
"""Nats by which a token's recorded log-prob may differ from the trainer's own."""
MARGIN_TOLERANCE = 0.05
"""Nats: the 99th percentile of |h| that the differences may add up to."""


def report(deltas: Sequence[Sequence[Sequence[float]]], dtype: str) -> dict[str, Any]:
    """What differences (group, completion, token; nats) say: ``passed`` with what was measured against which tolerance.

    ``passed`` is None where nothing was compared. A group's margin error is the widest difference between the errors of its
    completions' sums.
    """
    tokens = [delta for group in deltas for completion in group for delta in completion]
    if not tokens:
        return {"passed": None, "checked": 0}
    # Written so that a NaN fails: max() may pass over one.
    worst = math.nan if any(map(math.isnan, tokens)) else max(map(abs, tokens))
    sums = [[math.fsum(completion) for completion in group] for group in deltas]
    h = sorted(max(group) - min(group) for group in sums)
    h_p99 = h[math.ceil(0.99 * len(h)) - 1]
    return {
        "passed": worst <= TOLERANCE[dtype] and h_p99 <= MARGIN_TOLERANCE,
        "checked": sum(map(len, deltas)),
        "max_token_delta": worst,
        "token_tolerance": TOLERANCE[dtype],
        "h_p99": h_p99,
        "h_tolerance": MARGIN_TOLERANCE,
    }
