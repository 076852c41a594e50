"""Report + duel votes + configuration → CONTINUE | PROMOTE | HOLD | REJECT, with a reason per rule. Pure.

Guardrails on the offline report come first and cost no traffic; they and the clock can stop a version, only a duel can
promote it. The duel is judged by a one-sided mixture e-process (Ville's inequality: under "the challenger is no better",
P(E ever reaches 1/alpha) <= alpha), so looking after every pick is free. The reversed e-value does the same for "worse".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

from pairloop.config import GateSection
from pairloop.loop.gate.count import CHALLENGER, CHAMPION, Count, Tally, count
from pairloop.loop.gate.evidence import capped, log_e_value, win_rate
from pairloop.loop.gate.rails import OfflineReport, guardrails, says_of_seed
from pairloop.loop.gate.seed import seed_duel
from pairloop.loop.gate.sides import adjusted, coin
from pairloop.loop.gate.slices import worst_slice
from pairloop.types import DuelPick, Reason, Verdict
from pairloop.types import VerdictKind as Kind


def decide(
    report: OfflineReport,
    duel_votes: Sequence[DuelPick],
    config: GateSection,
    *,
    opened_at: datetime,
    now: datetime,
    picks_made: int = 0,
    more_to_come: bool = True,
    duel_number: int = 1,
    also: Sequence[Reason] = (),
    seed_votes: Sequence[DuelPick] | None = None,
) -> Verdict:
    """The verdict on a challenger.

    ``also``: rules that the caller looked at, which count like guardrails: one that failed rejects, an open one holds.
    ``picks_made``: the picks that the duel took from people, with those that do not count; it is these that ``max_picks``
    bounds. ``more_to_come=False`` (an offline duel that is over) turns CONTINUE into HOLD. ``duel_number``: this policy's
    duels up to this one, for lifetime spending. ``seed_votes``: those of the live duel against the base, which counts where the
    report does not say how the challenger does against it; None where there is none.
    """
    seed_votes = None if says_of_seed(report) else seed_votes
    rails = (*also, *guardrails(report, config, seed_is_live=seed_votes is not None))
    if any(reason.passed is False for reason in rails):
        return Verdict(Kind.REJECT, rails)
    if any(reason.passed is None for reason in rails):
        return Verdict(Kind.HOLD, rails)
    config = spent(config, duel_number)
    counted = count(duel_votes, config)
    looks = _looks(counted, duel_votes, seed_votes)
    kind, duel_reasons = _judge(counted, looks)
    if kind is Kind.CONTINUE:
        hours = (now - opened_at).total_seconds() / 3600
        limits = _limits(max(counted.tally.votes, picks_made), config, hours=hours, more_to_come=more_to_come)
        duel_reasons += limits
        kind = Kind.HOLD if any(reason.passed is False for reason in limits) else Kind.CONTINUE
    spending = () if config.spending == "duel" else (_spending(config, duel_number),)
    tally = counted.tally
    return Verdict(
        kind,
        (*duel_reasons, *looks, *spending, *rails),
        e_value=e_value_of(counted),
        wins=tally.wins,
        losses=tally.losses,
        ties=tally.ties,
        raters=tally.raters,
    )


def spent(config: GateSection, duel_number: int) -> GateSection:
    """The configuration with the alpha that the policy's ``duel_number``-th duel (from 1) may spend."""
    if config.spending == "duel":
        return config
    return config.model_copy(update={"alpha": config.alpha * 6 / (math.pi * duel_number) ** 2})


def e_value_of(counted: Count, winner: int = CHALLENGER, *, leave_out: int = 0) -> float:
    """The evidence for ``winner``, capped at the largest float."""
    return capped(counted.log_e_value(winner, leave_out=leave_out))


def picks_to_go(tally: Tally, config: GateSection) -> int:
    """About how many more votes decide the duel if the win rate stays as it is; at most up to ``max_picks``."""
    half = tally.ties // 2 if config.ties == "half" else 0
    wins, losses = tally.wins + half, tally.losses + half
    rate = (wins + 1) / (wins + losses + 2)  # with one vote each way in advance, so that 1-0 is not read as certainty
    needed = math.log(1 / config.alpha)

    def decided(more: int) -> bool:
        ahead, behind = wins + round(more * rate), losses + more - round(more * rate)
        return log_e_value(max(ahead, behind), min(ahead, behind)) >= needed

    low = max(0, config.min_picks - tally.decisive)
    high = max(low, config.max_picks - tally.votes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle + 1, high)
    return low


def _looks(counted: Count, duel_votes: Sequence[DuelPick], seed_votes: Sequence[DuelPick] | None) -> tuple[Reason, ...]:
    """What else the votes say: about the coin, side and length, slices, and the base."""
    config = counted.config
    sides = coin(counted.counted)
    if sides is None and "sides" in config.require:
        sides = Reason("sides", None, "no vote says on which side the challenger was shown")
    found = (
        sides,
        adjusted(counted.counted, is_required="adjusted_win_rate" in config.require),
        worst_slice(duel_votes, config),
        None if seed_votes is None else seed_duel(seed_votes, config),
    )
    return tuple(reason for reason in found if reason is not None)


def _judge(counted: Count, looks: Sequence[Reason]) -> tuple[Kind, tuple[Reason, ...]]:
    """The e-process with its minimum; CONTINUE while neither side has shown enough, or something required is open."""
    config, tally = counted.config, counted.tally
    threshold = 1 / config.alpha
    minimum = (
        _at_least("min_picks", tally.decisive, config.min_picks, "decisive picks"),
        _at_least("min_raters", tally.raters, config.min_raters, "raters"),
        *_robust(counted, threshold),
    )
    failed = {reason.rule for reason in looks if reason.passed is False}
    better, worse = e_value_of(counted), e_value_of(counted, CHAMPION)
    text = f"{_score(tally, config)}, e-value {_short(better)} of {_short(threshold)}"
    if "sides" in failed:
        return Kind.HOLD, (Reason("duel", None, f"{text}, which says nothing without a fair coin", better, threshold), *minimum)
    if counted.winner == CHAMPION:
        text = f"{_score(tally, config)}, reversed e-value {_short(worse)} ≥ {_short(threshold)}: the champion is better"
        return Kind.REJECT, (Reason("duel", False, text, worse, threshold), *minimum)
    if failed:
        return Kind.REJECT, (Reason("duel", None, text, better, threshold), *minimum)
    if counted.winner == CHALLENGER:
        text = f"{_score(tally, config)}, e-value {_short(better)} ≥ {_short(threshold)}"
        is_open = any(reason.passed is None for reason in looks)
        return Kind.CONTINUE if is_open else Kind.PROMOTE, (Reason("duel", True, text, better, threshold), *minimum)
    return Kind.CONTINUE, (Reason("duel", None, text, better, threshold), *minimum)


def _robust(counted: Count, threshold: float) -> tuple[Reason, ...]:
    """The duel without the raters most favourable to the challenger, where ``robust`` asks for it."""
    left_out = counted.left_out
    if not left_out:
        return ()
    without = e_value_of(counted, leave_out=left_out)
    is_met = without >= threshold
    text = f"without the {left_out} of {counted.tally.raters} raters most favourable to the challenger: "
    text += f"e-value {_short(without)} {'≥' if is_met else 'of'} {_short(threshold)}"
    return (Reason("robust", True if is_met else None, text, without, threshold),)


def _spending(config: GateSection, duel_number: int) -> Reason:
    text = (
        f"duel {duel_number} of this policy may err in {config.alpha:.2g} of cases, and all of them together in no more than "
    )
    text += f"{config.alpha * (math.pi * duel_number) ** 2 / 6:.2g}"
    return Reason("spending", True, text, config.alpha)


def _limits(picks: int, config: GateSection, *, hours: float, more_to_come: bool) -> tuple[Reason, ...]:
    """What ends an undecided duel; ``passed`` is False where a limit is reached."""
    reasons = []
    if picks >= config.max_picks:
        text = f"undecided after {picks} picks, the most this duel may take ({config.max_picks})"
        reasons.append(Reason("max_picks", False, text, picks, config.max_picks))
    if hours >= config.max_hours:
        text = f"undecided after {hours:.1f} hours, the longest this duel may take ({config.max_hours:g})"
        reasons.append(Reason("max_hours", False, text, hours, config.max_hours))
    if not more_to_come and not reasons:
        text = f"undecided, and no more than {picks} picks were to be had"
        reasons.append(Reason("exhausted", False, text, picks))
    return tuple(reasons)


def _score(tally: Tally, config: GateSection) -> str:
    if tally.votes == 0:
        return "no picks yet"
    if config.ties == "half" and tally.ties:
        rate = win_rate(tally.wins + tally.ties / 2, tally.votes)
        head = f"challenger won {tally.wins} of {tally.votes} picks with {tally.ties} ties counted half"
    else:
        rate = win_rate(tally.wins, tally.decisive)
        head = f"challenger won {tally.wins} of {tally.decisive} decisive picks"
    return f"{head} ({rate.mean * 100:.0f} %, 95 % interval {rate.lo * 100:.0f}–{rate.hi * 100:.0f} %)"


def _at_least(rule: str, observed: int, needed: int, what: str) -> Reason:
    met = observed >= needed
    sign = "≥" if met else "<"
    return Reason(rule, True if met else None, f"{observed} {what} {sign} {needed}", observed, needed)


def _short(value: float) -> str:
    return f"{value:.1e}" if value >= 1e5 else f"{value:.0f}" if value >= 10 else f"{value:.2g}"
