"""What the demo leaves behind: a table, a curve, a page, sample answers before and after, and one JSON document."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pairloop.types import Interval

CURVE_FILE = "curve.png"
PAGE_FILE = "report.html"
JSON_FILE = "demo.json"


@dataclass(frozen=True)
class Score:
    """One model on the held-out prompts."""

    version: int | None
    win_rate: Interval
    utility: float
    fidelity: Interval


@dataclass(frozen=True)
class Round:
    """One cycle: the round's challenger, whatever its verdict; ``score`` is None where nothing was trained."""

    cycle: int
    verdict: str
    reasons: tuple[str, ...]
    score: Score | None
    picks: int
    duel_picks: int
    e_value: float
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Example:
    """One held-out prompt with the base's and the final champion's answer."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class DemoResult:
    rounds: tuple[Round, ...]
    base: Score
    final: Score
    promotions: int
    wall_s: float
    cpu_s: float
    settings: Mapping[str, Any]
    examples: tuple[Example, ...]
    control: Score | None = None
    open_command: str = field(default="")

    def as_json(self) -> dict[str, Any]:
        """The document of ``--json``."""
        document: dict[str, Any] = {
            "rounds": [_round_json(round_) for round_ in self.rounds],
            "base": {
                "utility": self.base.utility,
                "fidelity": _finite(self.base.fidelity.mean),
                "fidelity_n": self.base.fidelity.n,
            },
            "final": _score_json(self.final),
            "promotions": self.promotions,
            "wall_s": round(self.wall_s, 2),
            "cpu_s": round(self.cpu_s, 2),
            "settings": dict(self.settings),
        }
        if self.control is not None:
            document["control"] = _score_json(self.control)
        return document


def write_report(result: DemoResult, out: Path) -> None:
    """Writes the JSON document, the curve and the page into ``out``."""
    (out / JSON_FILE).write_text(json.dumps(result.as_json(), indent=2), encoding="utf-8")
    draw_curve(result, out / CURVE_FILE)
    (out / PAGE_FILE).write_text(_page(result, (out / CURVE_FILE).read_bytes()), encoding="utf-8")


HEADERS = (
    "round",
    "version",
    "verdict",
    "win rate vs base",
    "utility",
    "fidelity (n)",
    "picks",
    "duel picks",
    "seconds per phase",
)


def table_rows(result: DemoResult) -> list[tuple[str, ...]]:
    """The rows of the closing table: the base, each round's challenger, the control where it ran, the champion."""
    rows = [_row("–", "base", result.base, "", "", "")]
    for round_ in result.rounds:
        phases = " · ".join(f"{phase} {seconds:.1f}" for phase, seconds in round_.seconds.items())
        rows.append(_row(str(round_.cycle), round_.verdict, round_.score, str(round_.picks), str(round_.duel_picks), phases))
    if result.control is not None:
        rows.append(_row("–", "control: chosen-only fine-tuning", result.control, "", "", ""))
    rows.append(_row("end", "champion", result.final, "", "", ""))
    return rows


def _row(round_: str, verdict: str, score: Score | None, picks: str, duel_picks: str, phases: str) -> tuple[str, ...]:
    if score is None:
        return (round_, "–", verdict, "–", "–", "–", picks, duel_picks, phases)
    rate = score.win_rate
    return (
        round_,
        "–" if score.version is None else str(score.version),
        verdict,
        f"{rate.mean:.3f} [{rate.lo:.3f}, {rate.hi:.3f}]",
        f"{score.utility:.2f}",
        f"{score.fidelity.mean:.3f} ({score.fidelity.n})",
        picks,
        duel_picks,
        phases,
    )


def _score_json(score: Score) -> dict[str, Any]:
    return {
        "version": score.version,
        "win_rate": score.win_rate.mean,
        "ci95": [score.win_rate.lo, score.win_rate.hi],
        "n": score.win_rate.n,
        "utility": score.utility,
        "fidelity": _finite(score.fidelity.mean),
        "fidelity_n": score.fidelity.n,
    }


def _finite(value: float) -> float | None:
    """None for a mean of nothing."""
    return value if math.isfinite(value) else None


_NO_SCORE = dict.fromkeys(("version", "win_rate", "ci95", "n", "utility", "fidelity", "fidelity_n"))


def _round_json(round_: Round) -> dict[str, Any]:
    return {
        "cycle": round_.cycle,
        "verdict": round_.verdict,
        "reasons": list(round_.reasons),
        **(_NO_SCORE if round_.score is None else _score_json(round_.score)),
        "picks": round_.picks,
        "duel_picks": round_.duel_picks,
        "e_value": round_.e_value,
        "seconds": {phase: round(seconds, 2) for phase, seconds in round_.seconds.items()},
    }


_MARKS = {"PROMOTE": ("o", "#1a7f5a"), "HOLD": ("s", "#b7791f"), "REJECT": ("X", "#b83232")}


def draw_curve(result: DemoResult, path: Path) -> None:
    """Win rate against the base by round, with 95 % bars and the verdicts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scored = [(round_.cycle, round_.verdict, round_.score) for round_ in result.rounds if round_.score is not None]
    axes.plot([0, *[x for x, _, _ in scored]], [0.5, *[score.win_rate.mean for _, _, score in scored]], color="#9aa5b1", lw=1.2)
    axes.plot([0], [0.5], marker="o", color="#52606d", ls="none", label="base")
    seen: set[str] = set()
    for x, verdict, score in scored:
        marker, colour = _MARKS.get(verdict, ("d", "#52606d"))
        rate = score.win_rate
        bars = [[rate.mean - rate.lo], [rate.hi - rate.mean]]
        label = None if verdict in seen else verdict
        axes.errorbar([x], [rate.mean], yerr=bars, fmt=marker, color=colour, capsize=4, ms=7, label=label)
        axes.annotate(f"{rate.mean:.2f}", (x, rate.mean), textcoords="offset points", xytext=(9, 5), fontsize=9)
        seen.add(verdict)
    if result.control is not None:
        axes.axhline(result.control.win_rate.mean, ls="--", lw=1, color="#3b6fb6", label="control: chosen-only fine-tuning")
    axes.axhline(0.5, lw=0.8, color="#cbd2d9", zorder=0)
    axes.set(
        xlabel="round", ylabel=f"win rate against the base (n = {result.final.win_rate.n} held-out prompts)", ylim=(0.3, 1.0)
    )
    axes.set_xticks(range(len(result.rounds) + 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    figure.savefig(path)


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#1f2933;background:#fff}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.4rem .6rem;border-bottom:1px solid #e4e7eb}
img{max-width:100%}blockquote{margin:.3rem 0;padding:.3rem .8rem;border-left:3px solid #cbd2d9}.after{border-color:#1a7f5a}
code{background:#f0f4f8;padding:.15rem .35rem;border-radius:.25rem}h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem}
@media(prefers-color-scheme:dark){body{background:#11181f;color:#e4e7eb}th,td{border-color:#323f4b}code{background:#1f2933}
img{background:#fff;border-radius:.5rem}}
"""


def _page(result: DemoResult, curve: bytes) -> str:
    head = "".join(f"<th>{html.escape(header)}</th>" for header in HEADERS)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table_rows(result))
    reasons = "".join(f"<li>round {r.cycle}, {r.verdict}: {html.escape('; '.join(r.reasons))}</li>" for r in result.rounds)
    examples = "".join(
        f"<p><b>Customer.</b> {html.escape(e.prompt)}</p><blockquote>before: {html.escape(e.before)}</blockquote>"
        f'<blockquote class="after">after: {html.escape(e.after)}</blockquote>'
        for e in result.examples
    )
    picture = base64.b64encode(curve).decode()
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>pairloop demo</title><style>{_STYLE}</style><h1>pairloop: {len(result.rounds)} rounds of picks</h1>"
        f'<img alt="Win rate against the base by round" src="data:image/png;base64,{picture}">'
        f"<h2>Rounds</h2><table><tr>{head}</tr>{rows}</table><h2>Why</h2><ul>{reasons}</ul>"
        f"<h2>The same questions, before and after</h2>{examples}"
        f"<h2>Go on</h2><p>Open this loop: <code>{html.escape(result.open_command)}</code></p>"
        f"<p>{result.wall_s:.0f} s on the clock, {result.cpu_s:.0f} CPU seconds. Held-out prompts join names and order numbers "
        "that no training text joined; they come from the same generator: generalisation inside its world only.</p></html>"
    )


def examples(prompts: Sequence[str], before: Sequence[str], after: Sequence[str], n: int = 5) -> tuple[Example, ...]:
    """The first ``n`` prompts whose answer changed."""
    changed = [Example(p, b, a) for p, b, a in zip(prompts, before, after, strict=True) if a != b]
    return tuple(changed[:n])
