"""R1 to R3, read from what `pairloop lab equivalence --json` printed: gradients side by side, and expectations."""

from __future__ import annotations

from pathlib import Path

from pairloop.lab import drift, taylor
from pairloop.lab.claims.base import Claim, Data, Outcome, markdown_table

COSINE, RATIO, EXACT, SIMULATED = 1e-12, 1e-9, 1e-9, 0.02
APART = 1e-4
"""Gradients that are claimed to differ in direction do so by more than this in 1 - cosine."""
_COMMAND = "pairloop lab equivalence --json"


def judge_gradients(data: Data) -> Outcome:
    """R1: where a ratio is claimed the gradients are parallel with that ratio; where none is, they are visibly not."""
    claimed = [row for row in data["rows"] if row["expected_ratio"] is not None]
    unclaimed = [row for row in data["rows"] if row["expected_ratio"] is None]
    if not claimed:
        return Outcome(None, "no row claims a ratio")
    off, slip = max(row["cosine_distance"] for row in claimed), max(_slip(row) for row in claimed)
    result = f"{len(claimed)} comparisons: 1 − cosine at most {off:.1e}, error of the ratio at most {slip:.1e}"
    if unclaimed:
        cosines = [row["cosine"] for row in unclaimed]
        result += f"; {len(unclaimed)} that are claimed to differ have cosines from {min(cosines):.3f} to {max(cosines):.3f}"
    is_apart = all(row["cosine_distance"] > APART for row in unclaimed)
    return Outcome(off < COSINE and slip < RATIO and is_apart, result, _gradient_table(data))


def _slip(row: Data) -> float:
    return abs(float(row["ratio"]) / float(row["expected_ratio"]) - 1)


def _gradient_table(data: Data) -> str:
    headers = ("model", "left", "right", "lengths", "1 − cosine", "ratio", "claimed")
    rows = [
        (
            *(str(row[key]) for key in ("model", "dpo", "grpo", "lengths")),
            f"{row['cosine_distance']:.1e}",
            f"{row['ratio']:.6g}",
            "cosine below 1" if row["expected_ratio"] is None else f"{row['expected_ratio']:.6g}",
        )
        for row in data["rows"]
    ]
    return markdown_table(headers, rows)


def judge_expectations(data: Data) -> Outcome:
    """R2: exact expectations over every group of small worlds."""
    return _judge_rows(data, "R2", EXACT)


def judge_weights(data: Data) -> Outcome:
    """R3: simulated weights c_G(p) and shares of usable groups."""
    return _judge_rows(data, "R3", SIMULATED)


def _judge_rows(data: Data, claim: str, tolerance: float) -> Outcome:
    rows = [row for row in data["expectations"] if row["claim"] == claim]
    if not rows:
        return Outcome(None, f"the file has no rows of {claim}")
    worst = max(rows, key=lambda row: float(row["relative_error"]))
    error = float(worst["relative_error"])
    result = f"{len(rows)} figures, relative error at most {error:.1e} ({worst['name']})"
    headers = ("", "expected", "found", "relative error")
    cells = [
        (row["name"], *(f"{row[key]:.6g}" for key in ("expected", "value")), f"{row['relative_error']:.1e}") for row in rows
    ]
    return Outcome(error < tolerance, result, markdown_table(headers, cells))


def plot_taylor(data: Data, path: Path) -> None:
    """What each step of the derivation drops, against the distance from the reference."""
    taylor.plot(data["taylor"], path)


def plot_drift(data: Data, path: Path) -> None:
    """How the equality of expectations decays as the policy leaves the sampler."""
    drift.plot(data["drift"], path)


EQUIVALENCE: tuple[Claim, ...] = (
    Claim(
        id="R1",
        title="At policy = reference = sampler the gradients of DPO and of two-completion GRPO are parallel, with known ratios",
        threshold="float64: 1 − cosine < 1e-12, error of the ratio < 1e-9",
        command=_COMMAND,
        judge=judge_gradients,
        plot=plot_taylor,
        results="equivalence",
    ),
    Claim(
        id="R2",
        title="In expectation an online DPO step is a policy gradient step",
        threshold="by enumeration: relative error < 1e-9",
        command=_COMMAND,
        judge=judge_expectations,
        plot=plot_drift,
        results="equivalence",
    ),
    Claim(
        id="R3",
        title="What a group of G adds: the weight c_G(p) of a prompt, and the share of usable groups",
        threshold="by simulation: within 2 %",
        command=_COMMAND,
        judge=judge_weights,
        results="equivalence",
    ),
)
