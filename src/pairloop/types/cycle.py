"""One turn of the loop, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any


class CycleState(StrEnum):
    """Where a cycle stands; each move is one appended record."""

    BUILDING = "building"
    TRAINING = "training"
    CHECKING = "checking"
    DUELLING = "duelling"
    CANARY = "canary"
    PROMOTED = "promoted"
    HELD = "held"
    REJECTED = "rejected"
    NOTHING_TO_TRAIN = "nothing_to_train"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL_CYCLE_STATES

    @property
    def is_waiting(self) -> bool:
        """Whether the cycle waits for people, and holds no lease."""
        return self in (CycleState.DUELLING, CycleState.CANARY)


_TERMINAL_CYCLE_STATES = frozenset(
    {CycleState.PROMOTED, CycleState.HELD, CycleState.REJECTED, CycleState.NOTHING_TO_TRAIN, CycleState.FAILED}
)


@dataclass(frozen=True, slots=True)
class CycleStep:
    """One recorded move of a cycle: the state it entered and the record of the stage that led there."""

    state: CycleState
    record: Mapping[str, Any]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Cycle:
    """One turn of the loop for one policy; its state is that of its last step."""

    cycle_id: str
    policy: str
    number: int
    parent: int
    trigger: str
    created_at: datetime
    steps: tuple[CycleStep, ...]

    @property
    def state(self) -> CycleState:
        return self.steps[-1].state

    def record(self, state: CycleState) -> Mapping[str, Any] | None:
        """The record with which the cycle entered ``state``, or None where it has not been there."""
        return next((step.record for step in self.steps if step.state is state), None)
