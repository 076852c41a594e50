"""Raters: what is odd about them, how often picks are flipped, quarantine with a reason, and the labelling queue with its gold.

Votes are never deleted.
"""

from __future__ import annotations

from pairloop.loop.raters import gold
from pairloop.loop.raters.checks import Checked, Observed, Share, check
from pairloop.loop.raters.desk import (
    NEWEST,
    DuelEffect,
    Effect,
    Raters,
    decide,
    known_id,
    look,
    measured_flips,
    preview,
    stored_id,
)
from pairloop.loop.raters.flips import FlipRate, flip_rate
from pairloop.loop.raters.overview import Overview, alone, overview
from pairloop.loop.raters.profile import Agreement, Profile, agreement, profiles
from pairloop.loop.raters.progress import Progress, progress
from pairloop.loop.raters.queue import Held, Item, next_item, pool_for, reserve

__all__ = [
    "NEWEST",
    "Agreement",
    "Checked",
    "DuelEffect",
    "Effect",
    "FlipRate",
    "Held",
    "Item",
    "Observed",
    "Overview",
    "Profile",
    "Progress",
    "Raters",
    "Share",
    "agreement",
    "alone",
    "check",
    "decide",
    "flip_rate",
    "gold",
    "known_id",
    "look",
    "measured_flips",
    "next_item",
    "overview",
    "pool_for",
    "preview",
    "profiles",
    "progress",
    "reserve",
    "stored_id",
]
