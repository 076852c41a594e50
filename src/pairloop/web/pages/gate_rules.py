"""A verdict's rules as rows of a table: what was observed, and which figure of it was compared with the threshold. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pairloop.loop import gate
from pairloop.statistics import percent
from pairloop.types import Interval, Reason

_SHOWN = frozenset({"verifier", "heldout_accuracy", "seed_duel"})
"""These must be shown to reach their threshold, or not shown to miss it: an end of the interval decides."""
_EVIDENCE = {
    "sides": "the evidence against a fair coin",
    "worst_slice": "the evidence that the champion is better",
}
"""A share is shown, and an e-value decides."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A row, its figures in words. ``compared``: the figure that stood against the threshold, empty where it is what was
    observed, or where no figure of the row is; ``what`` says which it is. ``interval`` is empty where there is none."""

    reason: Reason
    meaning: str
    observed: str
    interval: str
    compared: str
    what: str
    threshold: str


def rule_of(reason: Reason, interval: Interval | None) -> Rule:
    """``interval``: of what the rule looked at, if it has one."""
    known = gate.RULES.get(reason.rule)
    unit = "score" if known is None else known.unit
    of_interval = "share" if reason.rule == "duel" else unit  # of the win rate, whatever the evidence is counted in
    end = _end(reason)
    if interval is None:
        shown = ""
        observed = reason.observed if end is None else None
    else:
        shown = f"{figure(interval.lo, of_interval)} to {figure(interval.hi, of_interval)}"
        shown += " won" if reason.rule == "duel" else ""
        observed = reason.observed if end is None else interval.mean
    compared, what = _compared(reason, interval, end)
    return Rule(
        reason,
        "" if known is None else known.meaning,
        figure(observed, unit),
        shown,
        "" if compared is None else figure(compared, unit),
        what,
        figure(reason.threshold, unit),
    )


def _end(reason: Reason) -> str | None:
    """Which end of the interval the gate compared; None where it was no end, or where nothing was known."""
    observed, limit = reason.observed, reason.threshold
    if observed is None or limit is None:
        return None
    if reason.rule in _SHOWN:
        # One that is not required passes as long as it is not shown to be below.
        is_upper = reason.passed is False or (reason.passed is True and observed < limit)
        return "the upper end" if is_upper else "the lower end"
    if reason.rule == "adjusted_win_rate":
        return "the lower end"
    if reason.rule == "length_ratio" and reason.passed:
        return "both ends"
    if reason.rule == "length_ratio":
        return "the lower end" if observed < limit else "the upper end"
    return {"entropy_ratio": "the lower end", "kl_base": "the upper end"}.get(reason.rule)


def _compared(reason: Reason, interval: Interval | None, end: str | None) -> tuple[float | None, str]:
    """The figure, where it is another one than what was observed, and what it is in words."""
    if reason.observed is None or reason.threshold is None:
        return None, "–"
    if end == "both ends":
        return None, end
    if end is not None:
        given = None if interval is None else interval.hi if end == "the upper end" else interval.lo
        return reason.observed if given is None else given, end
    if reason.rule == "duel" and reason.passed is False:
        return None, "the reversed E, for the champion"
    return None, _EVIDENCE.get(reason.rule, "as observed")


def figure(value: float | None, unit: str) -> str:
    """``value`` in words, a dash for none; ``unit`` as in `gate.RULES`."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    match unit:
        case "share":
            return percent(value, 1)
        case "points":
            return f"{100 * value:.1f} points"
        case "count":
            return f"{value:,.0f}"
        case "e-value" if value >= 1e4:
            return f"{value:.1e}"
        case "hours":
            return f"{value:.3g} h"
        case "nats":
            return f"{value:.3g} nats"
    return f"{value:.3g}"
