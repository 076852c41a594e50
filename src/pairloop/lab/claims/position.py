"""R11: people who like the left side better do no harm where a coin decides the sides, and the coin lets one measure them.

Bias is in logits, as `starter.customers` adds it: a pick is left with probability sigmoid(u_left - u_right + bias). In
logits ± .1 is two standard errors of 1,600 picks between answers of equal worth.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairloop.config import GateSection
from pairloop.lab.claims import drawing
from pairloop.lab.claims.base import Claim, Data, Outcome, Settings, markdown_table
from pairloop.lab.claims.duels import Borders, borders, promoted_at
from pairloop.starter import corpus, customers
from pairloop.statistics import Z95, percent, share

LEFT_SHARE = 0.55
BIAS = math.log(LEFT_SHARE / (1 - LEFT_SHARE))
WITHIN, OFTEN = 0.1, 0.95
FEW_PICKS = 1_600


@dataclass(frozen=True, slots=True)
class Sizes:
    """Duels under each way to choose sides; repeated crowds for the error of an estimate; picks of one crowd."""

    duels: int = 2_000
    crowds: int = 100_000
    picks: tuple[int, ...] = (400, FEW_PICKS, 6_400)


def simulate(seed: int, config: GateSection, sizes: Sizes) -> dict[str, Any]:
    """Null duels with biased raters, sides by coin and challenger always left; and the bias as its picks show it."""
    generator = torch.Generator().manual_seed(seed)
    table = borders(config)
    shape = (sizes.duels, config.max_picks)
    is_left_DN = torch.rand(shape, generator=generator) < LEFT_SHARE
    challenger_left_DN = torch.rand(shape, generator=generator) < 0.5
    estimates = [_estimates(n, sizes.crowds, generator) for n in sizes.picks]
    return {
        "alpha": config.alpha,
        "bias": BIAS,
        "duels": sizes.duels,
        "promoted": {
            "sides_by_coin": _promotions(is_left_DN == challenger_left_DN, table),
            "challenger_always_left": _promotions(is_left_DN, table),
        },
        "estimates": estimates,
        "customers": _customers(seed, FEW_PICKS),
    }


def _promotions(won_DN: Tensor, table: Borders) -> int:
    return int((promoted_at(won_DN, table) > 0).sum())


def logit_of_left(left: int, picks: int) -> float:
    """The bias that ``left`` of ``picks`` show where both answers are worth the same: log(left / right), half a pick added."""
    return math.log((left + 0.5) / (picks - left + 0.5))


def bias_of_swapped(both_left: int, both_right: int) -> float:
    """The bias from pairs that were shown twice, the second time swapped; the worth of the answers cancels.

    P(left, left) / P(right, right) = e^{u+b} e^{-u+b} = e^{2b}, whatever u is; the estimate is half the logarithm of that.
    """
    return 0.5 * math.log((both_left + 0.5) / (both_right + 0.5))


def _estimates(picks: int, crowds: int, generator: torch.Generator) -> dict[str, Any]:
    """How far the estimates of ``crowds`` crowds of ``picks`` picks each lie from the truth."""
    counts = torch.full((crowds,), float(picks), dtype=torch.float64)
    left_C = torch.binomial(counts, torch.full_like(counts, LEFT_SHARE), generator=generator)
    error_C = torch.log((left_C + 0.5) / (counts - left_C + 0.5)) - BIAS
    return {
        "picks": picks,
        "crowds": crowds,
        "mean_error": float(error_C.mean()),
        "rms_error": float(error_C.square().mean().sqrt()),
        "within": int((error_C.abs() <= WITHIN).sum()),
    }


def _customers(seed: int, picks: int) -> dict[str, Any]:
    """One crowd of the starter's customers with this bias: on answers of one style, of any style, and shown swapped."""
    rng = random.Random(f"position-{seed}")
    crowd = [customers.customer(i, customers.Behaviour(position_bias=BIAS)) for i in range(picks)]
    alike = [left for one in crowd if (left := _is_left(one, _pair(rng, alike=True), rng)) is not None]
    mixed = [left for one in crowd if (left := _is_left(one, _pair(rng, alike=False), rng)) is not None]
    both = {True: 0, False: 0}
    for first, second in zip(crowd[0::2], crowd[1::2], strict=True):
        case, a, b = _pair(rng, alike=False)
        sides = _is_left(first, (case, a, b), rng), _is_left(second, (case, b, a), rng)
        if sides[0] is not None and sides[0] == sides[1]:
            both[sides[0]] += 1
    return {
        "alike": {"picks": len(alike), "left": sum(alike)},
        "mixed": {"picks": len(mixed), "left": sum(mixed)},
        "swapped": {"pairs": picks // 2, "both_left": both[True], "both_right": both[False]},
    }


_Pair = tuple[corpus.Case, str, str]


def _pair(rng: random.Random, *, alike: bool) -> _Pair:
    """A case with two different answers; ``alike``: worth the same to the customer."""
    styles = list(corpus.STYLE_WEIGHTS)
    while True:
        case = corpus.draw_training_case(rng)
        a, b = (corpus.write_answer(case, rng.choice(styles), rng) for _ in "ab")
        if a != b and (not alike or customers.utility(case, a) == customers.utility(case, b)):
            return case, a, b


def _is_left(who: customers.Customer, pair: _Pair, rng: random.Random) -> bool | None:
    outcome = who.pick(*pair, rng).outcome
    return {"left": True, "right": False}.get(outcome)


def _run(settings: Settings) -> dict[str, Any]:
    return simulate(settings.seed, GateSection(), Sizes())


def judge(data: Data) -> Outcome:
    """Nulls by coin at most alpha; always left must be caught promoting them; estimates from 1,600 picks near the truth."""
    by_coin, fixed = (data["promoted"][key] / data["duels"] for key in ("sides_by_coin", "challenger_always_left"))
    few = next(row for row in data["estimates"] if row["picks"] == FEW_PICKS)
    near = few["within"] / few["crowds"]
    interval = share(by_coin, data["duels"])
    result = (
        f"{percent(LEFT_SHARE)} left picks ({data['bias']:.2f} logits): sides by coin promote {percent(by_coin, 2)} of "
        f"{data['duels']:,} nulls (95 % interval {interval.lo * 100:.2f}–{interval.hi * 100:.2f} %), the challenger always "
        f"left {percent(fixed, 1)}; "
        f"{percent(near, 1)} of the estimates from {FEW_PICKS:,} picks lie within ± {WITHIN:g} logits"
    )
    passed = by_coin <= data["alpha"] and fixed > data["alpha"] and near >= OFTEN
    return Outcome(passed, result, _details(data))


def _details(data: Data) -> str:
    headers = ("picks", "crowds", "mean error", "root mean square error", f"within ± {WITHIN:g}")
    rows = [
        (
            f"{row['picks']:,}",
            f"{row['crowds']:,}",
            f"{row['mean_error']:+.4f}",
            f"{row['rms_error']:.4f}",
            percent(row["within"] / row["crowds"], 1),
        )
        for row in data["estimates"]
    ]
    return f"{markdown_table(headers, rows)}\n\n{_customers_text(data)}"


def _customers_text(data: Data) -> str:
    alike, mixed, swapped = (data["customers"][key] for key in ("alike", "mixed", "swapped"))
    left, right = swapped["both_left"], swapped["both_right"]
    bias = f"{bias_of_swapped(left, right):+.2f} ± {_half_width(left, right) / 2:.2f}"
    return (
        "Bias in logits, estimated as the log-odds of a left pick between answers of equal worth. One crowd of the starter's "
        f"customers with a bias of {data['bias']:.2f}, on real answers: {_estimate(alike)} from {alike['picks']:,} picks "
        f"between answers of equal worth. Between answers of any worth the same log-odds say less than the truth "
        f"({_estimate(mixed)} from {mixed['picks']:,} picks), for there the better answer is picked on whichever side it "
        f"stands. Pairs shown twice, swapped, are free of that ({bias}), but only the {left + right} of {swapped['pairs']:,} "
        "where both people took the same side say anything."
    )


def _estimate(crowd: Data) -> str:
    left, picks = crowd["left"], crowd["picks"]
    return f"{logit_of_left(left, picks):+.2f} ± {_half_width(left, picks - left):.2f}"


def _half_width(left: int, right: int) -> float:
    """Of the 95 % interval of log(left / right)."""
    return Z95 * math.sqrt(1 / (left + 0.5) + 1 / (right + 0.5))


def plot(data: Data, path: Path) -> None:
    """Root mean square error of the estimate against the number of picks, beside 1 / sqrt(n p (1 - p))."""
    with drawing.axes(path, xlabel="picks", ylabel="error of the estimated bias (logits)") as axes:
        picks = [row["picks"] for row in data["estimates"]]
        theory = [1 / math.sqrt(n * LEFT_SHARE * (1 - LEFT_SHARE)) for n in picks]
        axes.plot(picks, theory, color=drawing.GREY, lw=1, label="1 / √(n p (1 − p))")
        axes.plot(picks, [row["rms_error"] for row in data["estimates"]], "o", color=drawing.BLUE, label="measured (rms)")
        axes.axhline(WITHIN / 2, color=drawing.RED, lw=0.8, ls=":", label="± .1 is two standard errors")
        axes.set(xscale="log", ylim=(0, None))
        axes.set_xticks(picks, [f"{n:,}" for n in picks])
        axes.minorticks_off()


R11 = Claim(
    id="R11",
    title="Position bias is harmless only where a coin decides the sides",
    threshold=f"{percent(LEFT_SHARE)} left picks: with sides by coin ≤ 5 % of nulls promoted (and more with the challenger "
    f"always left); the bias estimated within ± {WITHIN:g} logits from n ≥ {FEW_PICKS:,} picks, in {percent(OFTEN)} of crowds",
    command="pairloop lab claim R11",
    judge=judge,
    run=_run,
    plot=plot,
)
