"""What each rule of the gate means, in one sentence, and the interval of what it looked at: for whoever shows a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from pairloop.config import GateSection
from pairloop.loop.gate.count import count
from pairloop.loop.gate.evidence import win_rate
from pairloop.loop.gate.rails import OfflineReport
from pairloop.loop.gate.sides import bradley_terry
from pairloop.loop.gate.slices import by_slice
from pairloop.statistics import share
from pairloop.types import DuelPick, Interval, Verdict

Unit = Literal["e-value", "count", "share", "points", "ratio", "nats", "hours", "score"]


class Rule(NamedTuple):
    """``unit`` is that of what the rule observes and of its threshold; ``metric``: what it reads of the offline report."""

    meaning: str
    unit: Unit
    metric: str | None = None


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "duel": Rule(
            "The evidence E that the challenger wins more than half must reach 1/alpha; it may be looked at after every pick.",
            "e-value",
        ),
        "min_picks": Rule("So many picks that name a winner must count before the duel decides anything.", "count"),
        "min_raters": Rule("So many people must have picked before the duel decides anything.", "count"),
        "robust": Rule("The duel must be won without the raters most favourable to the challenger, too.", "e-value"),
        "sides": Rule("The challenger must have been shown first about as often as a fair coin would show it.", "share"),
        "adjusted_win_rate": Rule(
            "The win rate that is left once the place of an answer and its length are accounted for.", "share"
        ),
        "worst_slice": Rule("No group of users may be shown to be answered worse by the challenger.", "share"),
        "spending": Rule("Each further duel of a policy may err less often, so that all together err in alpha.", "share"),
        "max_picks": Rule("A duel that is undecided after so many picks ends, and the champion stays.", "count"),
        "max_hours": Rule("A duel that is undecided after so many hours ends, and the champion stays.", "hours"),
        "exhausted": Rule("There are no more picks to be had, and the duel is undecided: the champion stays.", "count"),
        "length_ratio": Rule("Answers may become neither much longer nor much shorter.", "ratio", "length_ratio"),
        "entropy_ratio": Rule("Answers must stay varied: what says the same always is stopped.", "ratio", "entropy_ratio"),
        "kl_base": Rule("The policy may move only so far from its base.", "nats", "kl_base"),
        "bad_share_increase": Rule("Hardly more answers may be cut off or empty.", "points", "bad_share_increase"),
        "verifier": Rule("The verifier's mean score may fall only so far below the champion's.", "score", "verifier_increase"),
        "seed_duel": Rule("Verifier or judge must prefer the challenger to the base.", "share", "seed_win_rate"),
        "heldout_accuracy": Rule("Held-out pairs, which never train, must be told right.", "share", "heldout_accuracy"),
        "suite": Rule("Cases of the suite that the champion passes must still be passed.", "count", "suite_lost"),
        "labeller_errors": Rule("The verifier or judge of an offline duel may fail on few prompts only.", "share"),
        "judge_flips": Rule("A judge may contradict itself only so often when the order of two answers is swapped.", "share"),
    }
)


def interval_of(
    rule: str, report: OfflineReport | None, verdict: Verdict, duel_votes: Sequence[DuelPick], config: GateSection
) -> Interval | None:
    """The 95 % interval of what ``rule`` looked at: a metric of the report, else of the votes that count; None without one."""
    metric = RULES[rule].metric if rule in RULES else None
    if metric is not None:
        return None if report is None or rule == "suite" else report.metrics.get(metric)
    match rule:
        case "duel":
            half = verdict.ties / 2 if config.ties == "half" else 0.0
            n = verdict.wins + verdict.losses + int(2 * half)
            return win_rate(verdict.wins + half, n) if n else None
        case "sides":
            shown = [vote.is_first for vote in count(duel_votes, config).counted if vote.is_first is not None]
            return share(sum(shown) / len(shown), len(shown)) if shown else None
        case "adjusted_win_rate":
            fitted = bradley_terry(count(duel_votes, config).counted)
            return None if fitted is None else fitted.win_rate
        case "worst_slice":
            return next((one.rate for one in by_slice(duel_votes, config)), None)
    return None
