"""From the picks of a duel to its votes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from pairloop.types import PREFERENCE_METRIC, Duel, DuelPick, Feedback, Label, LabelledGroup, Source


def votes(
    duel: Duel,
    picks: Iterable[LabelledGroup],
    *,
    min_latency_ms: int = 0,
    quarantined: Collection[str] = (),
    slices: Sequence[str] = (),
) -> list[DuelPick]:
    """The duel's picks (``store.duels.picks``) as votes in the order they were made: at most one per group.

    Two raters of one group judge the same two texts, so their picks are not independent: the group's first one counts.
    Where that was a human's in less than ``min_latency_ms`` or a quarantined rater's, the group is set aside: its versions were
    revealed to whoever picks next. A group whose texts are equal is a tie. A verifier or judge is no crowd: its votes carry as
    their rater whoever asked. ``slices``: keys of the groups' metadata that the votes keep.
    """
    counted = []
    for labelled in picks:
        group = labelled.group
        if group.duel_id != duel.duel_id or group.is_abandoned:
            continue
        rows = [row for row in labelled.feedback if row.metric == PREFERENCE_METRIC and row.label is not None]
        first = min(rows, key=lambda row: (row.created_at, row.feedback_id), default=None)
        if first is not None and not _is_instant(first, min_latency_ms) and first.rater_id not in quarantined:
            counted.append(_vote(duel, labelled, first, slices))
    return sorted(counted, key=lambda vote: vote.created_at)


def _is_instant(row: Feedback, min_latency_ms: int) -> bool:
    return row.source is Source.HUMAN and row.latency_ms is not None and row.latency_ms < min_latency_ms


def _vote(duel: Duel, labelled: LabelledGroup, row: Feedback, slices: Sequence[str]) -> DuelPick:
    group = labelled.group
    rater = row.rater_id if row.source is Source.HUMAN else group.rater_id
    chosen = {Label.A: 0, Label.B: 1}.get(row.label or Label.SKIP)
    ours = next(i for i, completion in enumerate(group.completions) if completion.version == duel.challenger)
    new, old = group.completions[ours].text, group.completions[1 - ours].text
    is_same = new == old and not group.is_erased  # an erased group's texts are gone; its vote was cast when they could be read
    outcome = 0 if chosen is None or is_same else 1 if chosen == ours else -1
    is_first = (row.shown_order[0] if row.shown_order else 0) == ours if row.source is Source.HUMAN else None
    ratio = len(new) / len(old) if new and old else None
    kept = tuple((key, group.metadata[key]) for key in slices if key in group.metadata)
    return DuelPick(rater, outcome, row.created_at, is_first, ratio, kept)
