"""From a file of dataset rows to labelled groups, or to every reason why a row was refused.

Rows in = groups made + rows refused, always. A pair becomes a group of two with a pick, a thumb a group of one with a
value, a scored group a group with a score per completion: what follows does not know that they were imported.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pairloop.errors import RowProblem, RowsError
from pairloop.formats.family import Family
from pairloop.formats.lines import Parsed, read_values
from pairloop.formats.registry import detect, family_named
from pairloop.formats.row import Draft, Mark, Row, kind_of
from pairloop.types import Completion, Feedback, Group, GroupKind, LabelledGroup, Message, Pool, Prompt, Source

UNKNOWN_RATER = "imported"
"""Who gave a label whose row does not name its rater."""

_MAX_CHARS = 200_000


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What a file holds: ``rows`` = ``len(groups)`` + the sum of ``refused``.

    ``refused`` counts each refused row once, under its first problem. ``counts`` describes all rows, refused ones
    included, as far as they could be read: ``prompts_in_file`` (distinct) and ``unanimous_in_file`` (comparisons on which
    at least two raters picked, all the same).
    """

    family: str | None
    rows: int
    groups: list[LabelledGroup]
    problems: list[RowProblem]
    refused: dict[str, int]
    counts: dict[str, int]

    def or_raise(self) -> ReadResult:
        """This result; RowsError with every problem where a row was refused."""
        if self.problems:
            raise RowsError(self.problems)
        return self


def read_rows(
    path: Path,
    *,
    family: str | None = None,
    max_chars: int = _MAX_CHARS,
    policy: str = "imported",
    at: datetime | None = None,
) -> ReadResult:
    """Every row of a JSONL file or JSON array; problems name file, line (array: place from 1), JSON path and reason.

    ``family`` is a name of ``registry.FAMILIES``; without it the first row that shows a family's keys decides for the
    whole file. A row whose prompt and longest answer exceed ``max_chars`` characters is refused as ``over_long``. ``at``
    becomes the groups' time, by default the file's own. Ids depend on the policy and the rows alone: reading a file
    again gives the same groups. UserError where the file cannot be read or the family is unknown.
    """
    forced = family_named(family) if family is not None else None
    parsed = list(read_values(path))
    found = forced or next((kind for row in parsed if (kind := _detect(row.value)) is not None), None)
    builder = _GroupBuilder(policy, at or datetime.fromtimestamp(path.stat().st_mtime, UTC))
    groups, problems, drafts = [], [], []
    refused: Counter[str] = Counter()
    for item in parsed:
        row, draft = _read_row(str(path), item, found, is_forced=forced is not None)
        if draft is not None:
            drafts.append(draft)
            _check_length(row, draft, max_chars)
        if draft is not None and not row.problems:
            groups.append(builder.group(row, draft))
            continue
        problems.extend(row.problems)
        refused[row.problems[0].reason] += 1
    return ReadResult(found.name if found else None, len(parsed), groups, problems, dict(refused), _counts(drafts))


def _read_row(file: str, item: Parsed, family: Family | None, *, is_forced: bool) -> tuple[Row, Draft | None]:
    """The row with its problems, and what it says where it is an object of the file's family."""
    if item.problem is not None:
        return Row(file, item.line, {}, [item.problem]), None
    if not isinstance(item.value, dict):
        row = Row(file, item.line, {})
        row.refuse("$", "not_an_object", f"a row must be an object, found {kind_of(item.value)}")
        return row, None
    row = Row(file, item.line, item.value)
    if family is None:
        row.refuse("$", "unknown_family", f"no known row family has these keys: {', '.join(item.value) or '(none)'}")
        return row, None
    other = None if is_forced else _detect(item.value)
    if other is not None and other is not family:
        message = f"a row of family {other.name} in a file of family {family.name}: give each family its own file"
        row.refuse("$", "mixed_families", message)
        return row, None
    row.source()
    return row, family.parse(row)


def _detect(value: object) -> Family | None:
    return detect(value) if isinstance(value, dict) else None


def _check_length(row: Row, draft: Draft, max_chars: int) -> None:
    if row.problems or draft.prompt is None:
        return
    prompt = draft.prompt if isinstance(draft.prompt, str) else "".join(message.content for message in draft.prompt)
    length = len(prompt) + max(len(text or "") for text in draft.completions)
    if length > max_chars:
        row.refuse("$", "over_long", f"prompt and answer have {length:,} characters; the limit is {max_chars:,}")


def _counts(drafts: list[Draft]) -> dict[str, int]:
    votes = [[mark.label for mark in draft.marks if mark.label is not None] for draft in drafts]
    return {
        "prompts_in_file": len({draft.prompt for draft in drafts if draft.prompt is not None}),
        "unanimous_in_file": sum(len(labels) > 1 and len(set(labels)) == 1 for labels in votes),
    }


class _GroupBuilder:
    """Makes groups whose ids depend on the policy, the row's meaning, and how often that row came before."""

    def __init__(self, policy: str, at: datetime) -> None:
        self._policy = policy
        self._at = at
        self._seen: Counter[str] = Counter()

    def group(self, row: Row, draft: Draft) -> LabelledGroup:
        assert draft.prompt is not None, "a row without problems has a prompt"
        source = row.source()
        content = json.dumps(
            [self._policy, _plain(draft.prompt), draft.completions, [_plain_mark(mark) for mark in draft.marks], source]
        )
        digest = hashlib.sha256(f"{content} {self._seen[content]}".encode()).hexdigest()[:32]
        self._seen[content] += 1
        group = Group(
            group_id=f"import_{digest}",
            policy=self._policy,
            kind=GroupKind.IMPORTED,
            pool=Pool.TRAIN,
            prompt=draft.prompt,
            completions=tuple(Completion(text or "") for text in draft.completions),
            created_at=self._at,
            metadata={"file": Path(row.file).name, "line": str(row.line)},
        )
        feedback = (self._feedback(group, index, mark, source) for index, mark in enumerate(draft.marks))
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
        )


def _plain(prompt: Prompt) -> object:
    return prompt if isinstance(prompt, str) else [_plain_message(message) for message in prompt]


def _plain_message(message: Message) -> list[str]:
    return [message.role, message.content]


def _plain_mark(mark: Mark) -> list[object]:
    return [mark.metric, mark.label, mark.choice_index, mark.value, mark.rater_id]
