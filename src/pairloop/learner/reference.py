"""The reference's log-probs: those recorded at sampling where the parent sampled, once they are found to be the model's own.

Otherwise the parent scores the pairs once, before step 1, and the result is kept beside the checkpoints.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pairloop.config import TrainSection
from pairloop.learner.data import Side, TokenPair
from pairloop.learner.files import flush
from pairloop.learner.scores import PairLogps, References, score

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}
"""Nats by which a token's recorded log-prob may differ from the trainer's own."""
MARGIN_TOLERANCE = 0.05
"""Nats: the 99th percentile of |h| that the differences may add up to."""

FILE = "reference.safetensors"


def prepare(
    model: nn.Module, pairs: Sequence[TokenPair], settings: TrainSection, dtype: str
) -> tuple[References, dict[str, Any]]:
    """References of all pairs under ``model``, which is still the parent, and the report on how they came about."""
    fresh = [pair for pair in pairs if pair.is_fresh]
    report = check(model, fresh, settings, dtype)
    if report["passed"] is False:
        fresh = []
    recorded = {pair.pair_id: _recorded(pair) for pair in fresh}
    rest = [pair for pair in pairs if pair.pair_id not in recorded]
    scored = score(model, rest, micro_batch_size=settings.micro_batch_size)
    reference = recorded | {pair.pair_id: logps for pair, logps in zip(rest, scored, strict=True)}
    sampler = {
        pair.pair_id: _recorded(pair) for pair in rest if not pair.is_fresh and pair.chosen.logps and pair.rejected.logps
    }
    report |= {"recorded": len(recorded), "scored": len(rest), "tempered": sum(pair.tempered for pair in pairs)}
    return References(reference, sampler), report


def check(model: nn.Module, fresh: Sequence[TokenPair], settings: TrainSection, dtype: str) -> dict[str, Any]:
    """Score a seeded choice of recorded completions again and compare token by token.

    ``passed`` is None where nothing was compared. The mean loss is no substitute: margins wrong by a nat in every pair move it
    by a thousandth only.
    """
    wanted = min(len(fresh), math.ceil(settings.reference_check / 2))
    chosen = random.Random(settings.seed).sample(list(fresh), wanted)
    if not chosen:
        return {"passed": None, "checked": 0}
    deltas = [
        (now.chosen - then.chosen, now.rejected - then.rejected)
        for now, then in zip(
            score(model, chosen, micro_batch_size=settings.micro_batch_size), map(_recorded, chosen), strict=True
        )
    ]
    worst = max(float(delta.abs().max()) for pair in deltas for delta in pair)
    h = sorted(abs(float(plus.double().sum() - minus.double().sum())) for plus, minus in deltas)
    h_p99 = h[math.ceil(0.99 * len(h)) - 1]
    return {
        # Written so that a NaN fails.
        "passed": worst <= TOLERANCE[dtype] and h_p99 <= MARGIN_TOLERANCE,
        "checked": 2 * len(chosen),
        "max_token_delta": worst,
        "token_tolerance": TOLERANCE[dtype],
        "h_p99": h_p99,
        "h_tolerance": MARGIN_TOLERANCE,
    }


def save(folder: Path, references: References, report: dict[str, Any], fingerprint: str) -> None:
    """Write the references whole or not at all; with them, a resumed run needs the parent no more."""
    tensors: dict[str, Tensor] = {}
    for kind, table in (("reference", references.reference), ("sampler", references.sampler)):
        sides = [side for logps in table.values() for side in (logps.chosen, logps.rejected)]
        tensors[f"{kind}.logps"] = torch.cat(sides) if sides else torch.zeros(0)
        tensors[f"{kind}.lengths"] = torch.tensor([len(side) for side in sides], dtype=torch.int64)
    ids = {"reference": list(references.reference), "sampler": list(references.sampler)}
    temporary = folder / f".{FILE}.tmp"
    save_file(tensors, temporary, {"ids": json.dumps(ids), "report": json.dumps(report), "fingerprint": fingerprint})
    flush(temporary)
    temporary.replace(folder / FILE)


def load(folder: Path, fingerprint: str) -> tuple[References, dict[str, Any]] | None:
    """What ``save`` wrote for the same data and settings, or None."""
    path = folder / FILE
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if metadata["fingerprint"] != fingerprint:
            return None
        ids = json.loads(metadata["ids"])
        tables = []
        for kind in ("reference", "sampler"):
            sides = iter(file.get_tensor(f"{kind}.logps").split(file.get_tensor(f"{kind}.lengths").tolist()))
            tables.append({pair_id: PairLogps(next(sides), next(sides)) for pair_id in ids[kind]})
    return References(*tables), json.loads(metadata["report"])


def _recorded(pair: TokenPair) -> PairLogps:
    return PairLogps(_tensor(pair.chosen), _tensor(pair.rejected))


def _tensor(side: Side) -> Tensor:
    return torch.tensor(side.logps, dtype=torch.float32)
