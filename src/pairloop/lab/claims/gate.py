"""R10: what the gate promises. A challenger that is no better passes in at most alpha of duels, however often one looks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pairloop.config import GateSection
from pairloop.lab.claims import drawing
from pairloop.lab.claims.base import Claim, Data, Outcome, Settings, markdown_table
from pairloop.lab.claims.duels import borders, picks_of, promoted_at, promoted_at_by_z_test
from pairloop.statistics import percent, share

NULL, GAIN = 0.5, 0.6
GAIN_BY, POWER = 600, 0.95
LOOK_EVERY = 50
"""How often the planted fault, the repeated z-test, looks; and the grid of the curves."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many duels are simulated at each true win rate."""

    null_duels: int = 10_000
    duels: int = 2_000
    win_rates: tuple[float, ...] = (NULL, 0.55, 0.58, GAIN, 0.65, 0.70)


def simulate(seed: int, config: GateSection, sizes: Sizes, settings: Settings) -> dict[str, Any]:
    """Duels at each true win rate, looked at after every pick up to ``max_picks``: how many promoted, and after how many."""
    generator = torch.Generator().manual_seed(seed)
    settings.on_progress("asking the gate", 0, len(sizes.win_rates))
    table = borders(config)
    bare = borders(config.model_copy(update={"min_picks": 1, "min_raters": 1}))
    rows, without_minimum, naive = [], 0, []
    for done, win_rate in enumerate(sizes.win_rates, 1):
        duels = sizes.null_duels if win_rate == NULL else sizes.duels
        ends = []
        for won_DN in picks_of(win_rate, duels=duels, picks=config.max_picks, generator=generator):
            ends.append(promoted_at(won_DN, table))
            if win_rate == NULL:
                without_minimum += int((promoted_at(won_DN, bare) > 0).sum())
                naive.append(promoted_at_by_z_test(won_DN, every=LOOK_EVERY))
        rows.append({"win_rate": win_rate, **_summary(torch.cat(ends), config.max_picks)})
        settings.on_progress("simulating duels", done, len(sizes.win_rates))
    return {
        "gate": {name: getattr(config, name) for name in ("alpha", "min_picks", "min_raters", "max_picks")},
        "rows": rows,
        "null_without_minimum": without_minimum,
        "z_test": {"look_every": LOOK_EVERY, **_summary(torch.cat(naive), config.max_picks)},
    }


def _summary(ends_D: torch.Tensor, picks: int) -> dict[str, Any]:
    """Of the picks after which duels promoted (0: never): how many did, the median, and how many by 50, 100, 150 … picks."""
    promoted = ends_D[ends_D > 0]
    grid = torch.arange(LOOK_EVERY, picks + 1, LOOK_EVERY)
    return {
        "duels": len(ends_D),
        "promoted": len(promoted),
        "median_picks": int(promoted.median()) if len(promoted) else None,
        "promoted_by": (promoted[:, None] <= grid).sum(0).tolist(),
    }


def _run(settings: Settings) -> dict[str, Any]:
    return simulate(settings.seed, GateSection(), Sizes(), settings)


def judge(data: Data) -> Outcome:
    """The null's share against alpha; the gain's by ``GAIN_BY`` picks; and the z-test must fail, else the null is no test."""
    gate, rows = data["gate"], {row["win_rate"]: row for row in data["rows"]}
    null, gain, naive = rows[NULL], rows[GAIN], data["z_test"]
    false, power = null["promoted"] / null["duels"], _by(gain, GAIN_BY) / gain["duels"]
    fooled = naive["promoted"] / naive["duels"]
    low, high = _percent_interval(null["promoted"], null["duels"])
    result = (
        f"null promoted in {percent(false, 2)} of {null['duels']:,} duels (95 % interval {low}–{high} %), "
        f"a true win rate of {GAIN:.2f} by {GAIN_BY} picks in {percent(power, 1)} of {gain['duels']:,}; "
        f"a z-test looked at every {naive['look_every']} picks would promote {percent(fooled, 1)} of nulls"
    )
    passed = false <= gate["alpha"] and power >= POWER and fooled > gate["alpha"]
    return Outcome(passed, result, _details(data))


def _details(data: Data) -> str:
    gate, null = data["gate"], data["rows"][0]
    headers = ("true win rate", f"promoted by {GAIN_BY} picks", f"by {gate['max_picks']:,} picks", "median picks")
    table = []
    for row in data["rows"]:
        n, median = row["duels"], row["median_picks"]
        cells = (f"{_by(row, GAIN_BY) / n:.3f}", f"{row['promoted'] / n:.3f}", "–" if row["win_rate"] == NULL else f"{median}")
        table.append((f"{row['win_rate']:.2f}", *cells))
    return (
        f"{markdown_table(headers, table)}\n\n"
        f"`loop.gate.decide` itself, a look after every pick, α = {gate['alpha']:g}, at least {gate['min_picks']} decisive "
        f"picks of {gate['min_raters']} raters, one vote per rater, a duel ends at {gate['max_picks']:,} picks or when the "
        f"reversed e-value rejects. Without the two minimums "
        f"{percent(data['null_without_minimum'] / null['duels'], 2)} of nulls would "
        "pass."
    )


def _by(row: Data, picks: int) -> int:
    return int(row["promoted_by"][picks // LOOK_EVERY - 1])


def _percent_interval(count: int, n: int) -> tuple[str, str]:
    interval = share(count / n, n)
    return f"{interval.lo * 100:.2f}", f"{interval.hi * 100:.2f}"


def plot(data: Data, path: Path) -> None:
    """Share of duels promoted by the number of picks, at each true win rate, with the z-test's nulls."""
    with drawing.axes(path, xlabel="picks", ylabel="share of duels promoted by then") as axes:
        for i, row in enumerate(data["rows"]):
            by = [count / row["duels"] for count in row["promoted_by"]]
            colour = drawing.RED if row["win_rate"] == NULL else drawing.BLUE
            axes.plot(_grid(by), by, color=colour, alpha=1 if i == 0 else 0.35 + 0.13 * i, label=f"{row['win_rate']:.2f}")
        naive = [count / data["z_test"]["duels"] for count in data["z_test"]["promoted_by"]]
        axes.plot(_grid(naive), naive, color=drawing.RED, ls="--", label=f"{NULL:.2f}, repeated z-test")
        axes.axhline(data["gate"]["alpha"], color=drawing.GREY, lw=0.8, ls=":")
        axes.set(xscale="log", ylim=(0, 1.02))


def _grid(values: list[float]) -> list[int]:
    return [LOOK_EVERY * (i + 1) for i in range(len(values))]


R10 = Claim(
    id="R10",
    title="The gate's error control holds under continuous looking, and a real gain passes in time",
    threshold="false promotions ≤ 5 % over at least 2,000 null duels looked at after every pick; "
    f"a true win rate of {GAIN:.2f} promoted in ≥ {percent(POWER)} of duels by {GAIN_BY} picks",
    command="pairloop lab claim R10",
    judge=judge,
    run=_run,
    plot=plot,
)
