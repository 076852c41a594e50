"""What a job says while it trains: metrics events every few steps, and when it is expected to end."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

MOST_EVENTS = 50
"""About so many metrics events in a job's life, however long it is."""

_NAMES = {
    "loss": "train_loss",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
}
_KEPT = ("kl", "entropy", "ess", "grad_norm", "lr")


class Progress:
    """Follows the rows of a training; ``known`` is what is stored with the job."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known: dict[str, Any] = dict(known)
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._first: tuple[int, datetime] | None = None

    def hear(self, row: Mapping[str, Any]) -> None:
        """A row of the metrics file: of a step, or of a look at the held-out rows."""
        if "heldout" in row:
            self._events.append((f"Step {row['step']}: validation loss={_shown(row['heldout'].get('loss'))}", heldout_figures(row)))
            return
        step, of, now = int(row["step"]), int(row["of"]), datetime.now(UTC)
        self.known |= {"step": step, "of": of, "expected_end": self._expected_end(step, of, now)}
        if step <= self.known.get("told_step", 0):
            return  # done again after an interruption
        if step == 1 or step == of or step % max(1, of // MOST_EVENTS) == 0:
            self.known["told_step"] = step
            self._events.append((f"Step {step}/{of}: training loss={_shown(row.get('loss'))}", step_figures(row)))

    def take_events(self) -> list[tuple[str, dict[str, Any]]]:
        """Message and data of the events since the last call."""
        events, self._events = self._events, []
        return events

    def _expected_end(self, step: int, of: int, now: datetime) -> str | None:
        if self._first is None or self._first[0] >= step:
            self._first = (step, now)
            return None
        per_step_s = (now - self._first[1]).total_seconds() / (step - self._first[0])
        return (now + timedelta(seconds=per_step_s * (of - step))).isoformat()


def step_figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """An event's data of one step, rewards and margins under the names that trainers use."""
    figures = {new: row[old] for old, new in _NAMES.items() if row.get(old) is not None}
    return {
        "step": row["step"],
        "total_steps": row["of"],
        **figures,
        **{name: row[name] for name in _KEPT if row.get(name) is not None},
    }


def heldout_figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same of the held-out rows."""
    found = row["heldout"]
    figures = {f"valid_{new.removeprefix('train_')}": found[old] for old, new in _NAMES.items() if found.get(old) is not None}
    return {"step": row["step"], **figures}


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "?"
