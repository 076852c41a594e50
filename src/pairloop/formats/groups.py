"""What a row says as a labelled group, and back: a pair is a group of two with a pick, a thumb a group of one with a value.

A scored group has a score per completion, a supervised row is a group of one with a demonstration. What follows does not know
that they were imported.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from datetime import datetime
from pathlib import Path

from pairloop.formats.row import Draft, Mark, Row
from pairloop.types import (
    DEMONSTRATION_METRIC,
    PREFERENCE_METRIC,
    SCORE_METRIC,
    Completion,
    Feedback,
    Group,
    GroupKind,
    Label,
    LabelledGroup,
    Message,
    Pool,
    PreferencePair,
    Prompt,
    Source,
    TrainingRow,
)

UNKNOWN_RATER = "imported"
"""Who gave a label whose row does not name its rater."""

_PARALLEL = "parallel_tool_calls"


class GroupBuilder:
    """Makes groups whose ids depend on the policy, the row's meaning, and how often that row came before."""

    def __init__(self, policy: str, at: datetime) -> None:
        self._policy = policy
        self._at = at
        self._seen: Counter[bytes] = Counter()

    def group(self, row: Row, draft: Draft) -> LabelledGroup:
        assert draft.prompt is not None, "a row without problems has a prompt"
        marks = [_plain_mark(mark) for mark in draft.marks]
        content = json.dumps([self._policy, plain(draft.prompt), draft.completions, marks, draft.source])
        key = hashlib.sha256(content.encode()).digest()[:16]
        digest = hashlib.sha256(f"{content} {self._seen[key]}".encode()).hexdigest()[:32]
        self._seen[key] += 1
        metadata = {"file": Path(row.file).name, "line": str(row.line)}
        group = Group(
            group_id=f"import_{digest}",
            policy=self._policy,
            kind=GroupKind.IMPORTED,
            pool=Pool.TRAIN,
            prompt=draft.prompt,
            completions=tuple(Completion(text or "") for text in draft.completions),
            created_at=self._at,
            metadata=metadata if draft.parallel_tool_calls else {**metadata, _PARALLEL: "false"},
        )
        feedback = (self._feedback(group, index, mark, draft.source) for index, mark in enumerate(draft.marks))
        return LabelledGroup(group, tuple(feedback))

    def _feedback(self, group: Group, index: int, mark: Mark, source: Source) -> Feedback:
        return Feedback(
            feedback_id=f"feedback_{group.group_id.removeprefix('import_')}{index:04x}",
            group_id=group.group_id,
            metric=mark.metric,
            source=source,
            rater_id=mark.rater_id or UNKNOWN_RATER,
            created_at=self._at,
            label=mark.label,
            choice_index=mark.choice_index,
            value=mark.value,
            text=mark.text,
        )


def draft_of_group(labelled: LabelledGroup) -> Draft:
    """What the group's feedback says, ready to be written as a row; a row has one source, the first one's."""
    group = labelled.group
    marks = tuple(
        Mark(
            row.metric,
            label=row.label,
            choice_index=row.choice_index,
            value=row.value,
            rater_id=None if row.rater_id == UNKNOWN_RATER else row.rater_id,
            text=row.text,
        )
        for row in labelled.feedback
    )
    source = labelled.feedback[0].source if labelled.feedback else Source.HUMAN
    parallel = group.metadata.get(_PARALLEL) != "false"
    return Draft(group.prompt, tuple(completion.text for completion in group.completions), marks, source, parallel)


def draft_of_row(row: TrainingRow) -> Draft:
    """A preference pair as a comparison decided for its first answer, a training group as a demonstration or as scores."""
    if isinstance(row, PreferencePair):
        marks = [Mark(PREFERENCE_METRIC, label=Label.A)]
        return Draft(row.prompt, (row.chosen.text, row.rejected.text), tuple(marks), row.source)
    texts = tuple(side.text for side in row.answers)
    if row.is_demonstration:
        marks = [Mark(DEMONSTRATION_METRIC, choice_index=0, value=texts[0])]
    else:
        marks = [Mark(SCORE_METRIC, choice_index=index, value=reward) for index, reward in enumerate(row.rewards)]
    return Draft(row.prompt, texts, tuple(marks), row.source)


def plain(prompt: Prompt) -> object:
    """The prompt as JSON values, short: role and content, and the whole turn only where tools are called or answered."""
    return prompt if isinstance(prompt, str) else [_plain_message(message) for message in prompt]


def _plain_message(message: Message) -> object:
    if message.tool_calls or message.tool_call_id is not None:
        return message.as_dict()
    return [message.role, message.content]


def _plain_mark(mark: Mark) -> list[object]:
    said: list[object] = [mark.metric, mark.label, mark.choice_index, mark.value, mark.rater_id]
    return said if mark.text is None else [*said, mark.text]
