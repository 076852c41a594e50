"""Raters: what is odd about them, how often picks are flipped, and quarantine with a reason. Votes are never deleted."""

from __future__ import annotations

from pairloop.loop.raters.checks import Checked, Observed, Share, check
from pairloop.loop.raters.desk import DuelEffect, Effect, Raters, decide, look, measured_flips, preview, stored_id
from pairloop.loop.raters.flips import FlipRate, flip_rate
from pairloop.loop.raters.queue import Item, next_item

__all__ = [
    "Checked",
    "DuelEffect",
    "Effect",
    "FlipRate",
    "Item",
    "Observed",
    "Raters",
    "Share",
    "check",
    "decide",
    "flip_rate",
    "look",
    "measured_flips",
    "next_item",
    "preview",
    "stored_id",
]
