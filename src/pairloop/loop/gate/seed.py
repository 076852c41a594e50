"""The live anchor: how often raters prefer the challenger to the base.

A chain of duels, each won against the last champion, could drift away from the base; so could a champion that was spoilt, and
whatever beats it.
"""

from __future__ import annotations

from collections.abc import Sequence

from pairloop.config import GateSection
from pairloop.loop.gate.count import Tally, count
from pairloop.statistics import at_most
from pairloop.types import DuelPick, Interval, Reason

RULE, METRIC = "seed_duel", "seed_win_rate"
_ALPHA = 0.025
"""Of each end: 95 % as every other guardrail, though over all looks together."""


def against_base(seed_votes: Sequence[DuelPick], config: GateSection) -> tuple[Interval, Tally]:
    """The win rate of a version against the base, ties half, with a 95 % interval that holds however often one looks.

    Votes count as in the gate's duel, but with ``cluster = "rater"`` the first one of each rater. The bounds are
    ``statistics.at_most`` of wins and of losses.
    """
    changes: dict[str, object] = {"ties": "half"}
    if config.cluster == "rater":
        changes |= {"cluster": "pick", "max_picks_per_rater": 1}
    tally = count(seed_votes, config.model_copy(update=changes)).tally
    won, n = tally.wins + tally.ties / 2, tally.votes
    if n == 0:
        return Interval(0.5, 0.0, 1.0, 0), tally
    return Interval(won / n, 1 - at_most(n - won, n, _ALPHA), at_most(won, n, _ALPHA), n), tally


def seed_duel(seed_votes: Sequence[DuelPick], config: GateSection) -> Reason:
    """Non-inferiority: fails where the whole interval is below the limit; one that reaches over it is open if required.

    As in the duel itself nothing is said before ``min_raters`` have voted.
    """
    rate, tally = against_base(seed_votes, config)
    limit, is_required = config.min_seed_win_rate, RULE in config.require
    text = f"win rate against the base: {rate.mean:.2f} (95 % interval {rate.lo:.2f} to {rate.hi:.2f}) "
    text += f"in {rate.n} votes of {tally.raters} raters"
    if tally.raters < config.min_raters:
        text += f", says nothing before {config.min_raters} raters"
        return Reason(RULE, None if is_required else True, text, rate.lo, limit)
    if rate.hi < limit:
        return Reason(RULE, False, f"{text} is below {limit:g}", rate.hi, limit)
    if rate.lo >= limit:
        return Reason(RULE, True, f"{text}, at least {limit:g}", rate.lo, limit)
    text += f": not shown to be {'at least' if is_required else 'below'} {limit:g}"
    return Reason(RULE, None if is_required else True, text, rate.lo, limit)
