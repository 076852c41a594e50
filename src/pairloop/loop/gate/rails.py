"""Guardrails on the offline report: non-inferiority with 95 % intervals, before any traffic is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from pairloop.config import GateSection
from pairloop.loop.gate.seed import METRIC, RULE
from pairloop.types import Interval, Reason


class OfflineReport(Protocol):
    """What the gate reads of the offline report: metrics with intervals, and why a metric is missing."""

    @property
    def metrics(self) -> Mapping[str, Interval]: ...

    @property
    def errors(self) -> Mapping[str, str]: ...


def guardrails(report: OfflineReport, config: GateSection, *, seed_is_live: bool = False) -> tuple[Reason, ...]:
    """One reason per demanded metric, and per other one that is known; ``passed`` is None where what is demanded is not shown.

    Ratios and KL pass when the adverse end of the 95 % interval keeps within the limit (non-inferiority). The share of
    bad answers fails when it grew by more than the limit and its interval excludes no change: on tens of answers a
    margin of a few points cannot be shown, and a challenger like the champion must pass. The others fail when the whole
    interval is below the limit; where it reaches over it, they hold if required and pass if not. ``seed_is_live``: the raters
    compare the challenger with the base, so that it need not stand in the report.
    """
    known = (
        _at_least(
            report, config, "verifier", "verifier_increase", "verifier's score above the champion's", -config.max_verifier_drop
        ),
        None if seed_is_live and not says_of_seed(report) else _seed(report, config),
        _at_least(
            report, config, "heldout_accuracy", "heldout_accuracy", "held-out pairs got right", config.min_heldout_accuracy
        ),
        _suite(report, config),
    )
    return (
        _between(report, "length_ratio", "answer length over the champion's", config.min_length_ratio, config.max_length_ratio),
        _between(report, "entropy_ratio", "entropy per answer over the base's", config.min_entropy_ratio, math.inf),
        _between(report, "kl_base", "KL to the base in nats per answer", -math.inf, config.max_kl_to_base),
        _bad_share(report, config.max_bad_share),
        *(reason for reason in known if reason is not None),
    )


def says_of_seed(report: OfflineReport) -> bool:
    """Whether a verifier or judge compared the challenger with the base, or failed to."""
    return METRIC in report.metrics or METRIC in report.errors


def _value(report: OfflineReport, metric: str) -> Interval | None:
    """The metric, where it is known and its interval finite."""
    value = report.metrics.get(metric)
    return None if value is None or metric in report.errors or not math.isfinite(value.lo + value.hi) else value


def _missing(report: OfflineReport, metric: str, what: str, rule: str | None = None) -> Reason:
    why = report.errors.get(metric)
    text = f"{what}: could not be computed: {why}" if why else f"{what}: missing from the report"
    return Reason(rule or metric, None, text)


def _between(report: OfflineReport, metric: str, what: str, low: float, high: float) -> Reason:
    value = _value(report, metric)
    if value is None:
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
    value = _value(report, "bad_share_increase")
    if value is None:
        return _missing(report, "bad_share_increase", what)
    failed = value.mean > limit and value.lo > 0
    text = f"{what}: {value.mean * 100:.1f} (95 % interval {value.lo * 100:.1f} to {value.hi * 100:.1f})"
    sign = "more than" if failed else "within"
    return Reason("bad_share_increase", not failed, f"{text}, {sign} {limit * 100:g}", value.mean, limit)


def _at_least(report: OfflineReport, config: GateSection, rule: str, metric: str, what: str, limit: float) -> Reason | None:
    """None where the metric is neither required nor known."""
    is_required = rule in config.require
    value = _value(report, metric)
    if value is None:
        return _missing(report, metric, what, rule) if is_required else None
    seen = f"{what}: {value.mean:.2f} (95 % interval {value.lo:.2f} to {value.hi:.2f})"
    if value.hi < limit:
        return Reason(rule, False, f"{seen} is below {limit:g}", value.hi, limit)
    if value.lo >= limit:
        return Reason(rule, True, f"{seen}, at least {limit:g}", value.lo, limit)
    text = f"{seen}: not shown to be {'at least' if is_required else 'below'} {limit:g}"
    return Reason(rule, None if is_required else True, text, value.lo, limit)


def _seed(report: OfflineReport, config: GateSection) -> Reason | None:
    """By the verifier or judge; a duel may have been opened before the configuration asked for one against the base."""
    what = "win rate against the base"
    if says_of_seed(report) or RULE not in config.require:
        return _at_least(report, config, RULE, METRIC, what, config.min_seed_win_rate)
    return Reason(RULE, None, f"{what}: missing from the report, and no duel against the base was opened")


def _suite(report: OfflineReport, config: GateSection) -> Reason | None:
    """None where there are none; of those there are no more may be lost than allowed, and one that was not asked is HOLD."""
    metric, what = "suite_lost", "cases of the suite that the champion passes and it fails"
    value, limit = _value(report, metric), config.max_suite_lost
    if value is None:
        is_wanted = "suite" in config.require or metric in report.errors
        return _missing(report, metric, what, "suite") if is_wanted else None
    text = f"{what}: {value.mean:.0f} of {value.n}, at most {limit}"
    return Reason("suite", value.mean <= limit, text, value.mean, limit)
