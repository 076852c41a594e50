"""The gradient table (R1): which losses are one loss at the reference, on a real transformer in float64.

Pairs are sampled from the model itself, so that policy = sampler = reference, and every objective's gradient with respect to
all parameters is taken as one vector. `equivalence` puts this table, the expectations, the Taylor steps and the drift into
one document. Left out on purpose: anything about training; that is what `pairloop lab compare` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairloop.errors import ModelError
from pairloop.lab import drift, expectations, taylor
from pairloop.lab.expectations import Objectives
from pairloop.lab.probes import (
    EQUAL_LENGTH,
    Lengths,
    Probe,
    Sampled,
    cosine_distance,
    gradient,
    load_probe,
    pair_batch,
    sample_pairs,
    trainable,
)
from pairloop.objective import OBJECTIVES, Batch, ObjectiveSettings

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]

BETA, FLIPPED, KL_WEIGHT = 0.1, 0.1, 0.04
COSINE_TOLERANCE, RATIO_TOLERANCE = 1e-12, 1e-9
APART = 1e-4
"""Where the claim is a cosine below 1, it must be so by more than this."""

SAME_LOGP = 1e-9
"""Nats per token by which the model's log-probs in a batch may differ from those on sampling; float32 inside gives 1e-7."""

_OFF: dict[str, Any] = {"clip_low": math.inf, "clip_high": math.inf}


@dataclass(frozen=True, slots=True)
class Term:
    """One side of a comparison: an objective's name in OBJECTIVES under settings, and what the table calls it."""

    label: str
    objective: str
    settings: ObjectiveSettings


@dataclass(frozen=True, slots=True)
class Comparison:
    """expected_ratio: |gradient of left| / |gradient of right|; None where the directions themselves are claimed to differ."""

    left: Term
    right: Term
    expected_ratio: float | None


def _term(label: str, objective: str, **settings: Any) -> Term:
    return Term(label, objective, ObjectiveSettings(beta=BETA, **settings))


_DPO = _term("dpo", "dpo")
_NORM = _term("dpo_norm", "dpo_norm")
_SEQUENCE = _term("grpo 1/|o|, population std", "grpo", loss_mean="sequence")
_SUM = _term("grpo sum, population std", "grpo", loss_mean="sum")
_UNCLIPPED = _term("grpo sum, without clipping", "grpo", loss_mean="sum", **_OFF)
_WITH_KL = _term("grpo sum, with k3 KL", "grpo", loss_mean="sum", kl_weight=KL_WEIGHT)


def comparisons(lengths: Lengths, *, n_tokens: int, n_groups: int) -> Iterator[Comparison]:
    """Every line of the table for one batch of pairs; a ratio is constant, so the batch's token count enters DAPO's alone."""
    yield Comparison(_DPO, _SUM, BETA)
    yield Comparison(_DPO, _term("grpo sum, sample std", "grpo", loss_mean="sum", advantage_std="sample"), math.sqrt(2) * BETA)
    yield Comparison(_DPO, _term("dr_grpo", "dr_grpo"), 2 * BETA)
    yield Comparison(_DPO, _term("dapo", "dapo"), BETA * n_tokens / (2 * n_groups))
    yield Comparison(_DPO, _term("rloo", "rloo"), BETA)
    # 1/|o| weighs each completion by its length: another direction, unless all lengths are one.
    yield Comparison(_DPO, _SEQUENCE, BETA * EQUAL_LENGTH if lengths == "equal" else None)
    yield Comparison(_NORM, _SEQUENCE, BETA)
    yield Comparison(_DPO, _UNCLIPPED, BETA)
    yield Comparison(_DPO, _WITH_KL, BETA)
    yield Comparison(_UNCLIPPED, _SUM, 1.0)
    yield Comparison(_WITH_KL, _SUM, 1.0)
    yield Comparison(_DPO, _term("cdpo", "cdpo", label_smoothing=FLIPPED), 1 / (1 - 2 * FLIPPED))
    yield Comparison(_DPO, _term("rdpo", "rdpo", label_smoothing=FLIPPED), 1 - 2 * FLIPPED)
    yield Comparison(_DPO, _term("ipo", "ipo"), BETA * BETA / 2)
    yield Comparison(_DPO, _term("kto", "kto"), 4.0)
    # The options that stop or weigh what is stale have nothing to do where nothing is.
    yield Comparison(_DPO, _term("dpo, token clip", "dpo", token_clip=0.5), 1.0)
    yield Comparison(_DPO, _term("dpo, importance weights", "dpo", importance="sequence"), 1.0)


def gradient_rows(probe: Probe, sampled: Sampled, lengths: Lengths, *, objectives: Objectives = OBJECTIVES) -> list[Row]:
    """R1 for one model, on pairs sampled from it, whose log-probs on sampling are reference and sampler."""
    batch = pair_batch(probe.model, sampled)
    check_float64(probe, batch)
    parameters = trainable(probe.model)
    seen: dict[Term, Tensor] = {}

    def of(term: Term) -> Tensor:
        if term not in seen:
            seen[term] = gradient(objectives[term.objective].loss(batch, term.settings), parameters)
        return seen[term]

    lines = comparisons(lengths, n_tokens=int(batch.mask_BGT.sum()), n_groups=len(batch.weight_B))
    return [_row(probe.name, lengths, line, of(line.left), of(line.right)) for line in lines]


def check_float64(probe: Probe, batch: Batch) -> None:
    """ModelError where the model computes parts of its pass in less than float64: no gradient is exact to 1e-9 then."""
    gap = float((batch.logp_BGT.detach() - batch.ref_logp_BGT).abs().max())
    if batch.logp_BGT.dtype is not torch.float64 or gap > SAME_LOGP:
        raise ModelError(f"{probe.name}: does not compute in float64 throughout: two passes differ by {gap:.0e} nats per token")


def _row(model: str, lengths: Lengths, line: Comparison, left: Tensor, right: Tensor) -> Row:
    distance, ratio = cosine_distance(left, right), float(left.norm() / right.norm())
    expected = line.expected_ratio
    error = None if expected is None else abs(ratio / expected - 1)
    holds = distance > APART if error is None else distance < COSINE_TOLERANCE and error < RATIO_TOLERANCE
    return {
        "model": model,
        "dpo": line.left.label,
        "grpo": line.right.label,
        "lengths": lengths,
        "cosine": 1 - distance,
        "cosine_distance": distance,
        "ratio": ratio,
        "expected_ratio": expected,
        "ratio_error": error,
        "holds": holds,
    }


def silent(text: str, done: int, of: int) -> None:
    """Tells nobody."""
    del text, done, of


def equivalence(
    models: Sequence[str], *, seed: int, objectives: Objectives = OBJECTIVES, on_step: Progress = silent
) -> dict[str, Any]:
    """R1 to R3, the derivation's Taylor steps and the drift as one document; ``holds`` where every claim in it does.

    models: see `load_probe`. on_step: told what begins, how many parts are done, and of how many.
    """
    rows: list[Row] = []
    steps: list[Row] = []
    parts = len(models) + 2
    for done, name in enumerate(models):
        on_step(f"gradients and Taylor steps of {name}", done, parts)
        probe = load_probe(name, seed=seed)
        equal, ragged = sample_pairs(probe, "equal", seed=seed), sample_pairs(probe, "ragged", seed=seed)
        rows += gradient_rows(probe, equal, "equal", objectives=objectives)
        rows += gradient_rows(probe, ragged, "ragged", objectives=objectives)
        steps += taylor.taylor_rows(probe, ragged, objectives=objectives)
    on_step("expectations", parts - 2, parts)
    averages = expectations.expectations(seed=seed, objectives=objectives)
    on_step("drift", parts - 1, parts)
    points = drift.drift_rows(seed=seed, objectives=objectives)
    document = {"rows": rows, "expectations": averages, "taylor": steps, "drift": points}
    claims = claims_of(document)
    return {**document, "seed": seed, "beta": BETA, "holds": bool(rows) and all(row["holds"] for row in claims)}


def claims_of(document: Mapping[str, Any]) -> list[Row]:
    """All rows that hold or fail; of the drift those are the points without any."""
    return [row for part in ("rows", "expectations", "taylor", "drift") for row in document[part] if "holds" in row]


def plot(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """drift.png and taylor.png in ``folder``; the paths written."""
    paths = [folder / "drift.png", folder / "taylor.png"]
    drift.plot(document["drift"], paths[0])
    taylor.plot(document["taylor"], paths[1])
    return paths
