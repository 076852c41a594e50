"""Groups with what was said about them, as the pair builder's tests need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pairloop.store import Store, feedback, groups
from pairloop.types import (
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
    SamplingParams,
    Source,
    TrainingRow,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = "support-bot"


def ask(text: str) -> Prompt:
    return (Message("user", text),)


def answered(text: str, version: int | None = 0) -> Completion:
    return Completion(text, tuple(text.encode()), (-0.5,) * len(text.encode()), version)


_numbers = iter(range(10**9))


def said(
    *answers: str | Completion,
    prompt: Prompt = "q",
    kind: GroupKind = GroupKind.TRAIN,
    pool: Pool = Pool.TRAIN,
    sampling: SamplingParams | None = None,
    rows: Sequence[Feedback] = (),
) -> LabelledGroup:
    """A group with these answers, and these rows about it."""
    number = next(_numbers)
    completions = tuple(answer if isinstance(answer, Completion) else answered(answer) for answer in answers)
    group = Group(
        f"chatcmpl-{number:09d}",
        POLICY,
        kind,
        pool,
        prompt,
        completions,
        NOW + timedelta(seconds=number),
        prompt_token_ids=(1, 2, 3),
        sampling=sampling or SamplingParams(),
    )
    return LabelledGroup(group, tuple(replace(row, group_id=group.group_id) for row in rows))


def row(metric: str, **fields: Any) -> Feedback:
    known: dict[str, Any] = {"source": Source.HUMAN, "rater_id": f"rater-{next(_numbers)}", "created_at": NOW} | fields
    return Feedback(f"feedback-{next(_numbers):09d}", "", metric, **known)


def pick(label: Label, **fields: Any) -> Feedback:
    return row("preference", label=label, **fields)


def thumb(value: bool, index: int = 0, **fields: Any) -> Feedback:
    return row("thumbs", value=value, choice_index=index, **fields)


def scores(*values: float, rater: str = "checks:score") -> list[Feedback]:
    return [row("score", value=v, choice_index=i, source=Source.CODE, rater_id=rater) for i, v in enumerate(values)]


def partly_known(labelled: LabelledGroup, n: int) -> LabelledGroup:
    """The first ``n`` rows were known to an earlier round."""
    return replace(labelled, earlier=frozenset(one.feedback_id for one in labelled.feedback[:n]))


def statements(found: Sequence[TrainingRow]) -> list[tuple[str, str]]:
    assert all(isinstance(pair, PreferencePair) for pair in found)
    return [(pair.chosen.text, pair.rejected.text) for pair in found if isinstance(pair, PreferencePair)]


def put(store: Store, *labelled: LabelledGroup) -> None:
    def insert(c: Any) -> None:
        for one in labelled:
            groups.insert(c, one.group)
            for said_of_it in one.feedback:
                feedback.insert(c, said_of_it)

    store.write(insert)
