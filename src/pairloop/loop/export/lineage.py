"""Where an exported version came from, for programs: what the model card says, as JSON. Figures only, nobody's words."""

from __future__ import annotations

import json
from typing import Any

from pairloop.loop.export.facts import Facts
from pairloop.types import Verdict

LINEAGE_FILE = "lineage.json"


def lineage(facts: Facts, form: str) -> str:
    """The file's text. ``form``: ``adapter`` or ``model``; what is not known is null."""
    version, parent = facts.version, facts.version.parent
    told: dict[str, Any] = {
        "version": version.name,
        "parent": None if parent is None else f"{version.policy}@{parent}",
        "base_model": facts.base,
        "form": form,
        "created_at": version.created_at.isoformat(),
        "artifact_hash": version.artifact_hash,
        "run_id": version.run_id,
        "job_id": version.job_id,
        "cycle": None if facts.cycle is None else facts.cycle.number,
        "dataset": _dataset(facts),
        "recipe": dict(facts.recipe),
        "evaluation": {name: interval._asdict() for name, interval in facts.report.items()},
        "gate": None if facts.verdict is None else _gate(facts.verdict),
        "history": [
            {"action": move.action, "from": move.previous, "at": move.created_at.isoformat()} for move in facts.history
        ],
    }
    return json.dumps(told, indent=2) + "\n"


def _dataset(facts: Facts) -> dict[str, Any] | None:
    one = facts.dataset
    if one is None:
        return None
    rows = {"train": one.n_train, "heldout": one.n_heldout}
    return {
        "id": one.dataset_id,
        "hash": facts.data_hash,
        "rows": rows,
        "counts": dict(one.counts),
        "set_aside": dict(one.dropped),
    }


def _gate(verdict: Verdict) -> dict[str, Any]:
    """Without the reasons' words: those may quote a labeller's error, and that a message."""
    rules = [
        {"rule": one.rule, "passed": one.passed, "observed": one.observed, "threshold": one.threshold}
        for one in verdict.reasons
    ]
    votes = {"won": verdict.wins, "lost": verdict.losses, "tied": verdict.ties}
    return {"verdict": verdict.kind.value, "e_value": verdict.e_value, "votes": votes, "raters": verdict.raters, "rules": rules}
