"""What a job says while it trains: metrics events every few steps, and when it is expected to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pairloop.loop import train

MOST_EVENTS = 50
"""About so many metrics events in a job's life, however long it is."""

_NAMES = {
    "rewards_chosen": "rewards/chosen",
    "rewards_rejected": "rewards/rejected",
    "rewards_margin": "rewards/margins",
    "of": "total_steps",
}
_KEPT = ("kl", "ess", "grad_norm")


class Progress:
    """Follows the rows of a training; ``known`` is what is stored with the job."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known: dict[str, Any] = dict(known)
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._replayed = int(self.known.get("step", 0))
        self._first: tuple[int, datetime] | None = None

    def hear(self, row: Mapping[str, Any]) -> None:
        """A row of the metrics file: of a step, or of a look at the held-out rows."""
        if "heldout" in row or "epoch" in row:
            found = figures(row)
            seen = self.known.get("told_heldout_step", -1)
            if "valid_loss" in found and "epoch" not in row and int(row["step"]) > seen:
                self.known["told_heldout_step"] = int(row["step"])
                self._events.append((f"Step {row['step']}/{row['of']}: validation loss={found['valid_loss']:.4f}", found))
            return
        step, of, now = int(row["step"]), int(row["of"]), datetime.now(UTC)
        self.known |= {"step": step, "of": of, "expected_end": self._expected_end(step, of, now)}
        if step <= self.known.get("told_step", 0):
            return  # done again after an interruption
        if step == 1 or step == of or step % max(1, of // MOST_EVENTS) == 0:
            self.known["told_step"] = step
            found = figures(row)
            loss = found.get("train_loss")
            self._events.append((f"Step {step}/{of}: training loss={'?' if loss is None else f'{loss:.4f}'}", found))

    def take_events(self) -> list[tuple[str, dict[str, Any]]]:
        """Message and data of the events since the last call."""
        events, self._events = self._events, []
        return events

    def tell_again(self, events: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Events that were taken and could not be written: they come first the next time."""
        self._events[:0] = events

    def _expected_end(self, step: int, of: int, now: datetime) -> str | None:
        if step <= self._replayed:
            return None  # heard again after an interruption, all at once: says nothing about the pace
        if self._first is None or self._first[0] >= step:
            self._first = (step, now)
            return None
        per_step_s = (now - self._first[1]).total_seconds() / (step - self._first[0])
        return (now + timedelta(seconds=per_step_s * (of - step))).isoformat()


def figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says, rewards and margins under the names that trainers use."""
    found = {_NAMES.get(name, name): value for name, value in train.figures_of(row).items()}
    if "train_accuracy" in found:
        found["rewards/accuracies"] = found["train_accuracy"]
    return {**found, **{name: row[name] for name in _KEPT if row.get(name) is not None}}
