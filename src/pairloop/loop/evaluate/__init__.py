"""Evaluate: challenger against champion and base, before any traffic is spent; and the offline duel where there is none."""

from __future__ import annotations

from pairloop.loop.evaluate.labeller import MAX_LABELLER_ERRORS
from pairloop.loop.evaluate.offline import OfflineDuel, offline_duel
from pairloop.loop.evaluate.report import HELDOUT_PAIRS, SAMPLES_PER_PROMPT, Report, run

__all__ = ["HELDOUT_PAIRS", "MAX_LABELLER_ERRORS", "SAMPLES_PER_PROMPT", "OfflineDuel", "Report", "offline_duel", "run"]
