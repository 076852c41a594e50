"""Label smoothing from the measured flip rate: what a cycle's training assumes about the people whose picks it learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pairloop.config import override
from pairloop.loop import raters
from pairloop.loop.cycle.context import Loop
from pairloop.loop.raters.flips import MIN_REPEATS


def measure(loop: Loop) -> dict[str, Any]:
    """What goes into the cycle's record: the rate as measured, and what training uses. Empty where the setting is off."""
    if not loop.config.train.measured_smoothing:
        return {}
    found = raters.measured_flips(loop.store, loop.config)
    repeats = 0 if found is None else found.pairs
    if found is None or repeats < MIN_REPEATS:
        used, why = loop.config.train.label_smoothing, f"as set: {repeats} of {MIN_REPEATS} comparisons were shown twice"
    else:
        used, why = found.label_smoothing, f"measured on {repeats} comparisons that were shown twice"
    return {"smoothing": {"label_smoothing": used, "repeats": repeats, "why": why}}


def applied(loop: Loop, record: Mapping[str, Any]) -> Loop:
    """The loop with the smoothing that the cycle's record names: the same for every attempt at its training."""
    if "smoothing" not in record:
        return loop
    smoothing = record["smoothing"]["label_smoothing"]
    return replace(loop, config=override(loop.config, {"train": {"label_smoothing": smoothing}}))
