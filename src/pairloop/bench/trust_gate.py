"""What the gate promises, on simulated duels: each case is a crowd, the gate's settings, and a bound on the share promoted.

Every duel is judged by the gate's own count after every pick (`loop.gate.simulate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pairloop.config import GateSection
from pairloop.loop.gate import Crowd, simulate
from pairloop.loop.gate.plan import OnStep
from pairloop.statistics import percent, share

HEADERS = ("a challenger that is", "cluster", "promoted", "95 % interval", "promised", "kept")

_PLAIN = GateSection()
_BY_RATER = GateSection(cluster="rater")
_ROBUST = GateSection(cluster="rater", robust=0.1)
_BY_PICK = GateSection(cluster="pick", max_picks_per_rater=50)


@dataclass(frozen=True, slots=True)
class Case:
    """The share promoted ``by`` so many picks: at most ``bound`` of an error, above it of a planted fault, else at least."""

    name: str
    crowd: Crowd
    config: GateSection
    by: int
    bound: float
    is_error: bool = False
    is_fault: bool = False


CASES = (
    Case("null_rate", Crowd(0.5), _PLAIN, 2_000, 0.05, is_error=True),
    Case("power_60_at_600", Crowd(0.6), _PLAIN, 600, 0.95),
    Case("side_bias_null_rate", Crowd(0.5, side_bias=1.0), _PLAIN, 2_000, 0.05, is_error=True),
    Case("flips_20_power_60_at_1400", Crowd(0.6, flips=0.2), _PLAIN, 1_400, 0.9),
    Case("robust_colluders_null_rate", Crowd(0.5, colluders=0.1, picks_per_rater=6), _ROBUST, 2_000, 0.05, is_error=True),
    Case("robust_power_60_at_1200", Crowd(0.6, picks_per_rater=6), _ROBUST, 1_200, 0.95),
    Case("robust_power_65_at_600", Crowd(0.65, picks_per_rater=6), _ROBUST, 600, 0.95),
    Case("tastes_day_null_rate", Crowd(0.5, taste=0.3, picks_per_rater=2), _PLAIN, 2_000, 0.05, is_error=True),
    Case("tastes_null_rate", Crowd(0.5, taste=0.3, picks_per_rater=50), _BY_RATER, 2_000, 0.05, is_error=True),
    Case("fault_every_pick_counts", Crowd(0.5, taste=0.3, picks_per_rater=50), _BY_PICK, 2_000, 0.05, is_fault=True),
    Case("fault_colluders_unnoticed", Crowd(0.5, colluders=0.1, picks_per_rater=6), _PLAIN, 2_000, 0.05, is_fault=True),
    Case("fault_challenger_always_first", Crowd(0.5, side_bias=0.2, first_share=1.0), _PLAIN, 2_000, 0.05, is_fault=True),
)

TEXTS = {
    "null_rate": "no better",
    "power_60_at_600": "wins .60",
    "side_bias_null_rate": "no better; the first place adds 1 to the log odds, sides by coin",
    "flips_20_power_60_at_1400": "wins .60, and 20 % of picks are flipped",
    "robust_colluders_null_rate": "no better; a tenth of raters collude, six picks each",
    "robust_power_60_at_1200": "wins .60, six picks a rater",
    "robust_power_65_at_600": "wins .65, six picks a rater",
    "tastes_day_null_rate": "no better; raters with tastes (correlation .3), two days each",
    "tastes_null_rate": "no better; raters with tastes, 50 picks each",
    "fault_every_pick_counts": "planted fault: the same, with every pick a vote",
    "fault_colluders_unnoticed": "planted fault: colluders, without `robust`",
    "fault_challenger_always_first": "planted fault: shown first always, which adds .2",
}
"""The cases in words: the challenger, and who picks."""


def measure(*, duels: int, seed: int, on_step: OnStep | None = None, cases: Sequence[Case] = CASES) -> dict[str, Any]:
    """Case → share of duels promoted, and under ``detail`` each with its interval and what was promised."""
    detail = {}
    for i, case in enumerate(cases):
        ends = simulate(case.crowd, case.config, duels=duels, picks=case.by, seed=seed + i, on_step=on_step, text=case.name)
        promoted = sum(end > 0 for end in ends)
        interval = share(promoted / duels, duels)
        detail[case.name] = {
            "promoted": promoted,
            "duels": duels,
            "by": case.by,
            "rate": interval.mean,
            "ci95": [interval.lo, interval.hi],
            "cluster": case.config.cluster,
            "robust": case.config.robust,
            "bound": case.bound,
            "promise": "above" if case.is_fault else "at most" if case.is_error else "at least",
            "kept": _is_kept(case, interval.mean),
        }
    return {**{name: found["rate"] for name, found in detail.items()}, "seed": seed, "detail": detail}


def rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of ``measure``, below `HEADERS`."""
    return [
        (
            TEXTS.get(name, name),
            f"{one['cluster']}, robust {one['robust']:g}",
            f"{percent(one['rate'], 2)} of {one['duels']:,} by {one['by']:,} picks",
            f"{percent(one['ci95'][0], 2)} to {percent(one['ci95'][1], 2)}",
            f"{one['promise']} {percent(one['bound'])}",
            "yes" if one["kept"] else "NO",
        )
        for name, one in found["detail"].items()
    ]


def _is_kept(case: Case, rate: float) -> bool:
    """A planted fault must break the bound, else the case could not show one."""
    return rate > case.bound if case.is_fault else rate <= case.bound if case.is_error else rate >= case.bound
