"""Raters: what is odd about them, how often picks are flipped, and quarantine with a reason. Votes are never deleted."""

from __future__ import annotations

from pairloop.loop.raters.checks import Checked, Observed, Share, check
from pairloop.loop.raters.desk import DuelEffect, Effect, Raters, decide, look, preview
from pairloop.loop.raters.flips import FlipRate, flip_rate

__all__ = [
    "Checked",
    "DuelEffect",
    "Effect",
    "FlipRate",
    "Observed",
    "Raters",
    "Share",
    "check",
    "decide",
    "flip_rate",
    "look",
    "preview",
]
