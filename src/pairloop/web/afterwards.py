"""What became of feedback, for whoever gave it: "your pick is in version 13"."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from pairloop.client.shapes import AnswerFacts, FeedbackLineage, Lineage
from pairloop.store import lineage, set_aside
from pairloop.store.lineage import Trace
from pairloop.types import COMMENT_METRIC, GOLD_METRIC, PREFERENCE_METRIC, REPEAT_METRIC, GroupKind, Label, Pool
from pairloop.web.chat import version_name
from pairloop.web.context import Here

router = APIRouter(tags=["feedback"])

FeedbackIds = Annotated[
    list[Annotated[str, Query(max_length=128)]],
    Query(min_length=1, max_length=50, description="An id that a 201 told; may be given several times."),
]


@router.get("/v1/lineage", summary="What became of feedback: waiting, in which version, left out and why, or kept to judge by")
def feedback_lineage(feedback_id: FeedbackIds, context: Here) -> Lineage:
    """`use` is `trained` (`versions` learned from it, `serving` says whether one of them, or a descendant, answers now),
    `training`, `waiting` for the next cycle, `left_out` with its `reason`, `judged` (a pick of a duel), `examines` (the gate
    pool's, on which versions are examined and never trained), or `noted` (ties, comments and repeats train nothing).

    Ids that are not known (any more) are left out. `answers` are those of the inference, by index; of a duel they name their
    versions only where this row is the pick that revealed them; and `duel_id` of any other row is told once the duel has ended.
    """
    policy = context.policy_name
    with context.store.reading() as c:
        found = lineage.traces(c, policy, feedback_id)
        line = lineage.serving(c, policy)
        reasons = set_aside.reasons(c, [trace.feedback_id for trace in found])
    why = {feedback_id: reason for feedback_id, (reason, _) in reasons.items()}
    return Lineage(data=[_resource(policy, trace, line, why.get(trace.feedback_id)) for trace in found])


def _use(trace: Trace, reason: str | None) -> str:
    if trace.metric in (COMMENT_METRIC, REPEAT_METRIC) or trace.label is Label.SKIP:
        return "noted"
    if trace.kind is GroupKind.DUEL:
        return "judged" if trace.metric == PREFERENCE_METRIC else "noted"
    if trace.label in (Label.TIE, Label.BOTH_BAD):
        return "noted"
    if trace.pool is Pool.GATE:
        return "examines"
    if trace.versions:
        return "trained"
    if trace.is_training:
        return "training"
    return "waiting" if reason is None else "left_out"


def _resource(policy: str, trace: Trace, line: frozenset[int], reason: str | None) -> FeedbackLineage:
    use = _use(trace, reason)
    reveals = trace.metric == PREFERENCE_METRIC and trace.label is not Label.SKIP
    named = trace.kind is not GroupKind.DUEL or reveals
    return FeedbackLineage(
        id=trace.feedback_id,
        inference_id=trace.group_id,
        metric_name=PREFERENCE_METRIC if trace.metric in (GOLD_METRIC, REPEAT_METRIC) else trace.metric,  # not told apart
        label=None if trace.label is None else trace.label.value,
        use=use,
        reason=reason if use == "left_out" else None,
        versions=[f"{policy}@{number}" for number in trace.versions],
        serving=not line.isdisjoint(trace.versions),
        datasets=list(trace.datasets),
        duel_id=trace.duel_id if reveals or not trace.in_open_duel else None,
        answers=[
            AnswerFacts(
                version=version_name(policy, answer.version) if named else None,
                tokens=answer.tokens,
                finish_reason=answer.finish_reason,
            )
            for answer in trace.answers
        ],
    )
