"""What the table of preferences shows: a line of each group, and the facets with their links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from pairloop.store import Store, feedback, groups, outcomes, set_aside
from pairloop.store.outcomes import Outcome
from pairloop.store.preferences import Counted, State
from pairloop.types import PREFERENCE_METRIC, THUMBS_METRIC, Feedback, Group, GroupKind, Label
from pairloop.web.pages.became import state_of
from pairloop.web.words import WHY

SNIPPET = 180
"""Characters of a text that the table shows."""

STATE_WORDS: Mapping[str, str] = {
    State.WAITING: "waiting for the next dataset",
    State.LEFT_OUT: "left out",
    State.KEPT: "kept in a dataset",
    State.TRAINED: "trained on",
    State.EXCLUDED: "excluded",
    State.JUDGED: "judged a duel",
}
FACETS = ("state", "label", "reason", "pool", "kind", "source", "metric", "version")


@dataclass(frozen=True, slots=True)
class Line:
    """A group as the table shows it."""

    group: Group
    question: str
    answers: tuple[tuple[str, str, str], ...]
    """(letter, snippet, what it is: chosen, rejected or nothing)"""
    votes: tuple[Feedback, ...]
    outcome: Outcome
    reasons: tuple[str, ...]
    at: datetime
    state: State
    is_told: bool
    """Whether its versions may be: of a duel once somebody has picked."""


def lines_of(store: Store, policy: str, group_ids: Sequence[str]) -> list[Line]:
    """In the order of the ids, without those that were erased since."""
    with store.reading() as c:
        by_id = {group.group_id: group for group in groups.load_ids(c, group_ids)}
        said = {group_id: feedback.for_group(c, group_id) for group_id in by_id}
        became = outcomes.outcomes(c, policy, group_ids)
        reasons = set_aside.reasons(c, [row.feedback_id for rows in said.values() for row in rows])
    lines = []
    for group_id in group_ids:
        if group_id in by_id and said[group_id]:  # neither was erased since
            why = [reasons[row.feedback_id][0] for row in said[group_id] if row.feedback_id in reasons]
            lines.append(_line(by_id[group_id], said[group_id], became[group_id], tuple(dict.fromkeys(why))))
    return lines


def _line(group: Group, votes: list[Feedback], outcome: Outcome, reasons: tuple[str, ...]) -> Line:
    chosen = chosen_of(votes)
    answers = []
    for index, answer in enumerate(group.completions[:4]):
        role = "" if chosen is None else "chosen" if index == chosen else "rejected"
        answers.append((letter_of(index), answer.text[:SNIPPET], role))
    return Line(
        group=group,
        question=question_of(group)[:SNIPPET],
        answers=tuple(answers),
        votes=tuple(votes),
        outcome=outcome,
        reasons=reasons,
        at=max(row.created_at for row in votes),
        state=state_of(group, outcome, reasons),
        is_told=group.kind is not GroupKind.DUEL or any(row.label not in (None, Label.SKIP) for row in votes),
    )


def chosen_of(votes: list[Feedback]) -> int | None:
    """The answer that all decisive picks agree on."""
    picked = {row.label for row in votes if row.metric == PREFERENCE_METRIC and row.label in (Label.A, Label.B)}
    return None if len(picked) != 1 else (0 if picked == {Label.A} else 1)


def letter_of(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def said(row: Feedback) -> str:
    """What a vote says, in a word or two; texts stand elsewhere."""
    if row.label is not None:
        return row.label.replace("_", " ")
    metric = row.metric[:24]
    if isinstance(row.value, bool):
        return f"{metric} {('up' if row.value else 'down') if row.metric == THUMBS_METRIC else row.value}"
    return metric if row.value is None or isinstance(row.value, str) else f"{metric} {row.value:.4g}"


def question_of(group: Group) -> str:
    """The last thing that was asked."""
    if isinstance(group.prompt, str):
        return group.prompt
    asked = [message.content for message in group.prompt if message.role == "user"]
    return asked[-1] if asked else ""


def facets_of(counted: Counted, given: Mapping[str, str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Each facet with its values, the most frequent first; a value that is set leads to the same page without it."""
    shown = []
    for name in FACETS:
        values = dict(counted.facets.get(name, {}))
        if name in given:
            values.setdefault(given[name], 0)
        others = {key: value for key, value in given.items() if key != name}
        links = [
            {
                "word": STATE_WORDS.get(value, value) if name == "state" else value,
                "n": n,
                "is_set": given.get(name) == value,
                "query": urlencode(others if given.get(name) == value else {**others, name: value}),
                "why": WHY.get(value, "") if name == "reason" else "",
            }
            for value, n in sorted(values.items(), key=lambda item: (-item[1], item[0]))[:12]
        ]
        if len(links) > 1 or name in given:
            shown.append((name, links))
    return shown
