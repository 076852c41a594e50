"""The reference's log-probs: those recorded at sampling where the parent sampled, once they are found to be the model's own.

Otherwise the parent scores the pairs once, before step 1, and the result is kept beside the checkpoints.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pairloop.config import TrainSection
from pairloop.learner.data import TokenGroup
from pairloop.learner.files import flush
from pairloop.learner.memory import TokenBudget
from pairloop.learner.scores import GroupLogps, References, score
from pairloop.learner.workers import ALONE, Workers
from pairloop.policy import agreement

FILE = "reference.safetensors"


def prepare(
    model: nn.Module,
    groups: Sequence[TokenGroup],
    settings: TrainSection,
    dtype: str,
    budget: TokenBudget,
    workers: Workers = ALONE,
) -> tuple[References, dict[str, Any]]:
    """References of all groups under ``model``, which is still the parent, and the report on how they came about."""
    fresh = [group for group in groups if group.is_fresh]
    report = check(model, fresh, settings, dtype, budget, workers)
    if report["passed"] is False:
        fresh = []
    reference = {group.group_id: recorded(group) for group in fresh}
    rest = [group for group in groups if group.group_id not in reference]
    scored = score(model, rest, budget, workers)
    reference |= {group.group_id: logps for group, logps in zip(rest, scored, strict=True)}
    sampler = {group.group_id: recorded(group) for group in rest if not group.is_fresh and group.is_recorded}
    report |= {"recorded": len(fresh), "scored": len(rest), "tempered": sum(group.tempered for group in groups)}
    return References(reference, sampler), report


def check(
    model: nn.Module,
    fresh: Sequence[TokenGroup],
    settings: TrainSection,
    dtype: str,
    budget: TokenBudget | None = None,
    workers: Workers = ALONE,
) -> dict[str, Any]:
    """Score a seeded choice of recorded completions again and compare token by token.

    ``passed`` is None where nothing was compared. The mean loss is no substitute: margins wrong by a nat in every pair move it
    by a thousandth only. A group's margin error is the widest difference between the errors of its completions' sums.
    """
    wanted = min(len(fresh), math.ceil(settings.reference_check / 2))
    chosen = random.Random(settings.seed).sample(list(fresh), wanted)
    if not chosen:
        return {"passed": None, "checked": 0}
    now = score(model, chosen, budget, workers)
    deltas = [
        [new - old for new, old in zip(logps, recorded(group), strict=True)] for group, logps in zip(chosen, now, strict=True)
    ]
    return agreement.report([[delta.double().tolist() for delta in group] for group in deltas], dtype)


def recorded(group: TokenGroup) -> GroupLogps:
    """The log-probs recorded when the group was sampled."""
    return tuple(torch.tensor(completion.logps, dtype=torch.float32) for completion in group.completions)


def save(folder: Path, references: References, report: dict[str, Any], fingerprint: str) -> None:
    """Write the references whole or not at all; with them, a resumed run needs the parent no more."""
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, dict[str, int]] = {}
    for kind, table in (("reference", references.reference), ("sampler", references.sampler)):
        logps = [logp_T for group in table.values() for logp_T in group]
        tensors[f"{kind}.logps"] = torch.cat(logps) if logps else torch.zeros(0)
        tensors[f"{kind}.lengths"] = torch.tensor([len(logp_T) for logp_T in logps], dtype=torch.int64)
        sizes[kind] = {group_id: len(group) for group_id, group in table.items()}
    temporary = folder / f".{FILE}.tmp"
    save_file(tensors, temporary, {"sizes": json.dumps(sizes), "report": json.dumps(report), "fingerprint": fingerprint})
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
        tables = []
        for kind, sizes in json.loads(metadata["sizes"]).items():
            logps = iter(file.get_tensor(f"{kind}.logps").split(file.get_tensor(f"{kind}.lengths").tolist()))
            tables.append({group_id: tuple(islice(logps, size)) for group_id, size in sizes.items()})
    return References(*tables), json.loads(metadata["report"])
