"""What is trained on, and the run that does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from pairloop.types.conversation import Prompt
from pairloop.types.feedback import Source


@dataclass(frozen=True, slots=True)
class PairSide:
    """A side of a preference pair, or an answer of a training group. Empty ``token_ids`` means: tokenize the text."""

    text: str
    token_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A group of two with rewards (1, 0), with its lineage.

    ``sampled_by`` is the version that sampled both sides, or None where the sides were not sampled by one version of the
    policy (imported rows, edits). ``log-probs`` recorded at sampling are the reference's only where ``sampled_by`` is the
    parent of the training run.
    """

    pair_id: str
    prompt: Prompt
    chosen: PairSide
    rejected: PairSide
    source: Source = Source.HUMAN
    prompt_token_ids: tuple[int, ...] = ()
    sampled_by: int | None = None
    tempered: bool = False
    weight: float = 1.0
    group_ids: tuple[str, ...] = ()
    feedback_ids: tuple[str, ...] = ()

    @property
    def row_id(self) -> str:
        return self.pair_id


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """A prompt and its answers with a reward each, with its lineage: what a preference pair is, for any G >= 1.

    One answer with reward 1 is a demonstration, an ideal answer that somebody wrote or confirmed; several are a scored group.
    ``sampled_by``: see `PreferencePair`. ValueError unless each answer has one reward.
    """

    row_id: str
    prompt: Prompt
    answers: tuple[PairSide, ...]
    rewards: tuple[float, ...] = (1.0,)
    source: Source = Source.HUMAN
    prompt_token_ids: tuple[int, ...] = ()
    sampled_by: int | None = None
    tempered: bool = False
    weight: float = 1.0
    group_ids: tuple[str, ...] = ()
    feedback_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.answers or len(self.answers) != len(self.rewards):
            raise ValueError(f"{self.row_id}: {len(self.answers)} answers with {len(self.rewards)} rewards")

    @property
    def is_demonstration(self) -> bool:
        return len(self.answers) == 1


TrainingRow = PreferencePair | TrainingGroup
"""What a snapshot holds: preference pairs, demonstrations, scored groups."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A snapshot of training rows: an immutable, hash-named folder (JSONL and manifest) and its counts.

    ``counts`` maps what was kept; ``dropped`` maps each reason to the number of feedback rows it set aside.
    """

    dataset_id: str
    policy: str
    path: str
    n_train: int
    n_heldout: int
    counts: Mapping[str, int]
    dropped: Mapping[str, int]
    created_at: datetime


class RunStatus(StrEnum):
    """A training run's status; the two error states say whose fault it was. ``CANCELLED``: with its cycle, by hand."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    NOTHING_TO_TRAIN = "nothing_to_train"
    USER_ERROR = "user_error"
    SYSTEM_ERROR = "system_error"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Run:
    """A training run: who holds it, how far it is, and how it ended."""

    run_id: str
    policy: str
    cycle_id: str | None
    dataset_id: str
    parent: int
    status: RunStatus
    owner: str
    attempt: int
    lease_expires_at: datetime
    heartbeat_at: datetime
    progress: Mapping[str, Any]
    result: Mapping[str, Any]
    error: str | None
    created_at: datetime
