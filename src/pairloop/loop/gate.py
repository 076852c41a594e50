"""The gate: report + duel votes + configuration → CONTINUE | PROMOTE | HOLD | REJECT, with a reason per rule. Pure.

Guardrails on the offline report come first and cost no traffic; they and the clock can stop a version, only a duel can
promote it. The duel is judged by a one-sided mixture e-process (Ville's inequality: under "the challenger is no better",
P(E ever reaches 1/alpha) <= alpha), so looking after every pick is free. The reversed e-value does the same for "worse".
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from pairloop.config import GateSection
from pairloop.statistics import share
from pairloop.types import PREFERENCE_METRIC, Duel, DuelPick, Feedback, Interval, Label, LabelledGroup, Reason, Source, Verdict
from pairloop.types import VerdictKind as Kind

_MAX_LOG = math.log(sys.float_info.max)
_NEGLIGIBLE = 1e-18


class OfflineReport(Protocol):
    """What the gate reads of the offline report: metrics with intervals, and why a metric is missing."""

    @property
    def metrics(self) -> Mapping[str, Interval]: ...

    @property
    def errors(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True)
class Tally:
    """The votes that count: one per rater and day."""

    wins: int
    losses: int
    ties: int
    raters: int

    @property
    def decisive(self) -> int:
        return self.wins + self.losses

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties


# --- the e-process


def log_e_value(wins: int, losses: int) -> float:
    """Natural logarithm of :func:`e_value`; finite for any counts.

    With n = W + L and P(Beta(W+1, L+1) > 1/2) = P(Bin(n+1, 1/2) <= W) the powers of two cancel:
    E = sum_{k<=W} C(n+1, k) / ((L+1) C(n+1, W)). Summed downwards from k = W, term j is prod_{i<j} (W-i) / (L+2+i):
    all terms are positive, so nothing cancels and every digit is right.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"counts must not be negative: {wins} wins, {losses} losses")
    scale = 0.0  # log of what `term` and `total` are divided by, so that neither overflows
    term = total = 1.0
    for j in range(wins):
        ratio = (wins - j) / (losses + 2 + j)
        term *= ratio
        total += term
        if ratio < 1.0 and term < total * _NEGLIGIBLE:
            break  # ratios only fall from here: the rest is below the last digit
        if total > 1e250:
            scale += math.log(total)
            term /= total
            total = 1.0
    return scale + math.log(total) - math.log(losses + 1)


def e_value(wins: int, losses: int) -> float:
    """Evidence that the challenger wins more than half: E = 2^{n+1} B(W+1, L+1) P(Beta(W+1, L+1) > 1/2).

    The likelihood of the picks under a win rate uniform on (1/2, 1), divided by that at 1/2. Capped at the largest float.
    The evidence for the champion is ``e_value(losses, wins)``.
    """
    return math.exp(min(log_e_value(wins, losses), _MAX_LOG))


def win_rate(wins: float, n: int) -> Interval:
    """Share of wins with its Wilson 95 % interval."""
    return share(wins / n if n else 0.5, n)


# --- from picks to votes


def votes(duel: Duel, picks: Sequence[LabelledGroup], *, min_latency_ms: int = 0) -> list[DuelPick]:
    """The duel's picks (``store.duels.picks``) as votes in the order they were made: at most one per group.

    Two raters of one group judge the same two texts, so their picks are not independent: the group's first one counts.
    Where that was a human's in less than ``min_latency_ms``, the group is set aside: its versions were revealed to whoever
    picks next. A group whose texts are equal is a tie. A verifier or judge is no crowd: its votes carry as their rater whoever
    asked.
    """
    counted = []
    for labelled in picks:
        group = labelled.group
        if group.duel_id != duel.duel_id or group.is_abandoned:
            continue
        rows = [row for row in labelled.feedback if row.metric == PREFERENCE_METRIC and row.label is not None]
        first = min(rows, key=lambda row: (row.created_at, row.feedback_id), default=None)
        if first is not None and not _is_instant(first, min_latency_ms):
            counted.append(_vote(duel, labelled, first))
    return sorted(counted, key=lambda vote: vote.created_at)


def _is_instant(row: Feedback, min_latency_ms: int) -> bool:
    return row.source is Source.HUMAN and row.latency_ms is not None and row.latency_ms < min_latency_ms


def _vote(duel: Duel, labelled: LabelledGroup, row: Feedback) -> DuelPick:
    group = labelled.group
    rater = row.rater_id if row.source is Source.HUMAN else group.rater_id
    index = {Label.A: 0, Label.B: 1}.get(row.label or Label.SKIP)
    texts = {completion.text for completion in group.completions}
    # An erased group's texts are gone; its vote was cast when they could be read.
    if index is None or (len(texts) == 1 and not group.is_erased):
        return DuelPick(rater, 0, row.created_at)
    return DuelPick(rater, 1 if group.completions[index].version == duel.challenger else -1, row.created_at)


def tally(duel_votes: Sequence[DuelPick], config: GateSection) -> Tally:
    """Count one vote per rater and (UTC) day: the first one, or with ties dropped the first decisive one.

    One rater's many picks are one opinion. The first vote is chosen rather than the rater's majority because it is fixed
    when it is made: a majority would rewrite earlier votes later on, and the e-process is valid only for a record that
    grows. ``raters`` counts distinct people.
    """
    counts = {1: 0, -1: 0, 0: 0}
    seen: set[tuple[str, str]] = set()
    people: set[str] = set()
    tied: set[tuple[str, str]] = set()
    for vote in sorted(duel_votes, key=lambda vote: vote.created_at):
        key = (vote.rater_id, vote.created_at.date().isoformat())
        if key in seen:
            continue
        if vote.outcome == 0 and config.ties == "drop":
            tied.add(key)
            continue
        seen.add(key)
        people.add(vote.rater_id)
        counts[vote.outcome] += 1
    ties = len(tied - seen) if config.ties == "drop" else counts[0]
    return Tally(wins=counts[1], losses=counts[-1], ties=ties, raters=len(people))


def evidence(counts: Tally, config: GateSection) -> tuple[int, int]:
    """Wins and losses that enter the e-value; with ``ties = "half"`` each two ties add one of both (a supermartingale)."""
    half = counts.ties // 2 if config.ties == "half" else 0
    return counts.wins + half, counts.losses + half


# --- the verdict


def guardrails(report: OfflineReport, config: GateSection) -> tuple[Reason, ...]:
    """One reason per demanded metric; ``passed`` is None where the metric is missing or could not be computed.

    Ratios and KL pass when the adverse end of the 95 % interval keeps within the limit (non-inferiority). The share of
    bad answers fails when it grew by more than the limit and its interval excludes no change: on tens of answers a
    margin of a few points cannot be shown, and a challenger like the champion must pass.
    """
    return (
        _between(report, "length_ratio", "answer length over the champion's", config.min_length_ratio, config.max_length_ratio),
        _between(report, "entropy_ratio", "entropy per answer over the base's", config.min_entropy_ratio, math.inf),
        _between(report, "kl_base", "KL to the base in nats per answer", -math.inf, config.max_kl_to_base),
        _bad_share(report, config.max_bad_share),
    )


def decide(
    report: OfflineReport,
    duel_votes: Sequence[DuelPick],
    config: GateSection,
    *,
    opened_at: datetime,
    now: datetime,
    picks_made: int = 0,
    more_to_come: bool = True,
    also: Sequence[Reason] = (),
) -> Verdict:
    """The verdict on a challenger.

    ``also``: rules that the caller looked at, which count like guardrails: one that failed rejects, an open one holds.
    ``picks_made``: the picks that the duel took from people, with those that do not count; it is these that ``max_picks``
    bounds. ``more_to_come=False`` (an offline duel that is over) turns CONTINUE into HOLD.
    """
    rails = (*also, *guardrails(report, config))
    if any(reason.passed is False for reason in rails):
        return Verdict(Kind.REJECT, rails)
    if any(reason.passed is None for reason in rails):
        return Verdict(Kind.HOLD, rails)
    counts = tally(duel_votes, config)
    kind, duel_reasons = _judge(counts, config)
    if kind is Kind.CONTINUE:
        hours = (now - opened_at).total_seconds() / 3600
        limits = _limits(max(counts.votes, picks_made), config, hours=hours, more_to_come=more_to_come)
        duel_reasons += limits
        kind = Kind.HOLD if any(reason.passed is False for reason in limits) else Kind.CONTINUE
    wins, losses = evidence(counts, config)
    return Verdict(
        kind,
        duel_reasons + rails,
        e_value=e_value(wins, losses),
        wins=counts.wins,
        losses=counts.losses,
        ties=counts.ties,
        raters=counts.raters,
    )


def picks_to_go(counts: Tally, config: GateSection) -> int:
    """About how many more votes decide the duel if the win rate stays as it is; at most up to ``max_picks``."""
    wins, losses = evidence(counts, config)
    rate = (wins + 1) / (wins + losses + 2)  # with one vote each way in advance, so that 1-0 is not read as certainty
    needed = math.log(1 / config.alpha)

    def decided(more: int) -> bool:
        ahead, behind = wins + round(more * rate), losses + more - round(more * rate)
        return log_e_value(max(ahead, behind), min(ahead, behind)) >= needed

    low = max(0, config.min_picks - counts.decisive)
    high = max(low, config.max_picks - counts.votes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle + 1, high)
    return low


def _judge(counts: Tally, config: GateSection) -> tuple[Kind, tuple[Reason, ...]]:
    """The e-process with its minimum; CONTINUE while neither side has shown enough."""
    wins, losses = evidence(counts, config)
    threshold = 1 / config.alpha
    enough = counts.decisive >= config.min_picks and counts.raters >= config.min_raters
    better, worse = e_value(wins, losses), e_value(losses, wins)
    minimum = (
        _at_least("min_picks", counts.decisive, config.min_picks, "decisive picks"),
        _at_least("min_raters", counts.raters, config.min_raters, "raters"),
    )
    if enough and better >= threshold:
        text = f"{_score(counts, config)}, e-value {_short(better)} ≥ {threshold:g}"
        return Kind.PROMOTE, (Reason("duel", True, text, better, threshold), *minimum)
    if enough and worse >= threshold:
        text = f"{_score(counts, config)}, reversed e-value {_short(worse)} ≥ {threshold:g}: the champion is better"
        return Kind.REJECT, (Reason("duel", False, text, worse, threshold), *minimum)
    text = f"{_score(counts, config)}, e-value {_short(better)} of {threshold:g}"
    return Kind.CONTINUE, (Reason("duel", None, text, better, threshold), *minimum)


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


def _score(counts: Tally, config: GateSection) -> str:
    if counts.votes == 0:
        return "no picks yet"
    if config.ties == "half" and counts.ties:
        rate = win_rate(counts.wins + counts.ties / 2, counts.votes)
        head = f"challenger won {counts.wins} of {counts.votes} picks with {counts.ties} ties counted half"
    else:
        rate = win_rate(counts.wins, counts.decisive)
        head = f"challenger won {counts.wins} of {counts.decisive} decisive picks"
    return f"{head} ({rate.mean * 100:.0f} %, 95 % interval {rate.lo * 100:.0f}–{rate.hi * 100:.0f} %)"


def _at_least(rule: str, observed: int, needed: int, what: str) -> Reason:
    met = observed >= needed
    sign = "≥" if met else "<"
    return Reason(rule, True if met else None, f"{observed} {what} {sign} {needed}", observed, needed)


def _short(value: float) -> str:
    return f"{value:.1e}" if value >= 1e5 else f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _missing(report: OfflineReport, metric: str, what: str) -> Reason:
    why = report.errors.get(metric)
    return Reason(metric, None, f"{what}: could not be computed: {why}" if why else f"{what}: missing from the report")


def _between(report: OfflineReport, metric: str, what: str, low: float, high: float) -> Reason:
    value = report.metrics.get(metric)
    if value is None or metric in report.errors or not math.isfinite(value.lo + value.hi):
        return _missing(report, metric, what)
    seen = f"{what}: {value.mean:.2f} (95 % interval {value.lo:.2f} to {value.hi:.2f})"
    if value.lo < low:
        return Reason(metric, False, f"{seen} is not above {low:g}", value.lo, low)
    if value.hi > high:
        return Reason(metric, False, f"{seen} is not below {high:g}", value.hi, high)
    limits = [f"at least {low:g}"] * (low > -math.inf) + [f"at most {high:g}"] * (high < math.inf)
    return Reason(metric, True, f"{seen}, {' and '.join(limits)}", value.mean, high if low == -math.inf else low)


def _bad_share(report: OfflineReport, limit: float) -> Reason:
    what = "points of truncated or empty answers above the champion's"
    value = report.metrics.get("bad_share_increase")
    if value is None or "bad_share_increase" in report.errors:
        return _missing(report, "bad_share_increase", what)
    failed = value.mean > limit and value.lo > 0
    text = f"{what}: {value.mean * 100:.1f} (95 % interval {value.lo * 100:.1f} to {value.hi * 100:.1f})"
    sign = "more than" if failed else "within"
    return Reason("bad_share_increase", not failed, f"{text}, {sign} {limit * 100:g}", value.mean, limit)
