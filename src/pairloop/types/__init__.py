"""The vocabulary: frozen dataclasses and enums that every room speaks.

Standard library only. Axis letters in comments: B groups in the batch, G completions in a group, T tokens.
Ids carry their noun; times are timezone-aware UTC with the suffix ``_at``; durations end in ``_s``.
"""

from __future__ import annotations

from pairloop.types.conversation import (
    TOOLS_ROLE,
    Message,
    Prompt,
    ToolCall,
    messages_as_dicts,
    offered_tools,
    spoken,
    with_tools,
)
from pairloop.types.cycle import Cycle, CycleState, CycleStep
from pairloop.types.feedback import (
    COMMENT_METRIC,
    DEMONSTRATION_METRIC,
    ERROR_METRIC,
    GOLD_METRIC,
    OUR_NAMES,
    PREFERENCE_METRIC,
    REDACTED_TAG,
    RELABELLED_TAG,
    REPEAT_METRIC,
    SCORE_METRIC,
    THUMBS_METRIC,
    Feedback,
    Label,
    LabelledGroup,
    Source,
)
from pairloop.types.gate import Duel, DuelKind, DuelPick, Reason, Verdict, VerdictKind
from pairloop.types.group import GREEDY_BELOW, Completion, FinishReason, Group, GroupKind, Pool, SamplingParams, rater_of
from pairloop.types.interval import Interval
from pairloop.types.training import Dataset, PairSide, PreferencePair, Run, RunStatus, TrainingGroup, TrainingRow
from pairloop.types.version import BASE_VERSION, Alias, Version, VersionKind

__all__ = [
    "BASE_VERSION",
    "COMMENT_METRIC",
    "DEMONSTRATION_METRIC",
    "ERROR_METRIC",
    "GOLD_METRIC",
    "GREEDY_BELOW",
    "OUR_NAMES",
    "PREFERENCE_METRIC",
    "REDACTED_TAG",
    "RELABELLED_TAG",
    "REPEAT_METRIC",
    "SCORE_METRIC",
    "THUMBS_METRIC",
    "TOOLS_ROLE",
    "Alias",
    "Completion",
    "Cycle",
    "CycleState",
    "CycleStep",
    "Dataset",
    "Duel",
    "DuelKind",
    "DuelPick",
    "Feedback",
    "FinishReason",
    "Group",
    "GroupKind",
    "Interval",
    "Label",
    "LabelledGroup",
    "Message",
    "PairSide",
    "Pool",
    "PreferencePair",
    "Prompt",
    "Reason",
    "Run",
    "RunStatus",
    "SamplingParams",
    "Source",
    "ToolCall",
    "TrainingGroup",
    "TrainingRow",
    "Verdict",
    "VerdictKind",
    "Version",
    "VersionKind",
    "messages_as_dicts",
    "offered_tools",
    "rater_of",
    "spoken",
    "with_tools",
]
