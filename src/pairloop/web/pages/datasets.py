"""Datasets: what each holds, why the rest was left out, where it came from and what was made of it; the rows themselves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Query, Request, Response

from pairloop.errors import InvalidRequestError, NotFoundError, StoreError
from pairloop.formats import snapshot
from pairloop.store import datasets, provenance
from pairloop.store.artifacts import read_manifest
from pairloop.store.provenance import Maker
from pairloop.types import Dataset, Message, PreferencePair, TrainingRow, spoken
from pairloop.web.context import Context, Here
from pairloop.web.pages.rendering import PageRoute, page
from pairloop.web.words import WHY

ON_A_PAGE = 25
ROWS_ON_A_PAGE = 8

router = APIRouter(include_in_schema=False, route_class=PageRoute)

After = Annotated[str | None, Query(max_length=128)]
Split = Literal["train", "heldout"]
Byte = Annotated[int, Query(ge=0, le=2**62)]


class Reason(NamedTuple):
    """Rows left out for one reason; ``share`` of the most frequent one, for the bar."""

    code: str
    text: str
    rows: int
    share: float


class ShownRow(NamedTuple):
    """A training row as people read it."""

    id: str
    turns: tuple[Message, ...]
    sides: tuple[tuple[str, str], ...]
    source: str
    sampled_by: int | None
    group_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Detail:
    """A dataset with all that is known of it; ``current`` is what is left of it, None where its rows were removed."""

    dataset: Dataset
    current: Dataset | None
    maker: Maker
    versions: list[str]
    runs: list[tuple[str, str]]
    rules: list[tuple[str, str]]
    parent: int | None
    rows: list[ShownRow]
    next_at: int | None


@router.get("/datasets")
async def dataset_list(request: Request, context: Here, after: After = None) -> Response:
    def read() -> dict[str, Any]:
        with context.store.reading() as c:
            found = datasets.list_(c, context.policy_name, after=after, limit=ON_A_PAGE + 1, with_jobs=True)
            shown = found[:ON_A_PAGE]
            ids = [one.dataset_id for one in shown]
            made, used = provenance.makers(c, ids), provenance.trained_on(c, ids)
        more = shown[-1].dataset_id if len(found) > ON_A_PAGE else None
        return {"datasets": shown, "makers": made, "trained": used, "more": more, "after": after}

    return page(request, context, "datasets.html", title="Datasets", **await asyncio.to_thread(read))


@router.get("/datasets/{dataset_id}")
async def dataset_page(request: Request, context: Here, dataset_id: str, split: Split = "train", at: Byte = 0) -> Response:
    """``at``: the byte of the file where the shown rows begin, as the link to the next ones says."""
    found = await asyncio.to_thread(_detail, context, dataset_id, split, at)
    values: dict[str, Any] = {"found": found, "reasons": reasons_of(found.dataset.dropped), "split": split, "at": at}
    return page(request, context, "dataset.html", title=f"Dataset {short(dataset_id)}", **values)


def short(dataset_id: str) -> str:
    """An id by which people call a dataset."""
    return dataset_id.removeprefix("dataset_")[:10]


def reasons_of(dropped: Mapping[str, int]) -> list[Reason]:
    """The most frequent first."""
    most = max(dropped.values(), default=1)
    ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    return [Reason(code, WHY.get(code, code.replace("_", " ")), rows, rows / most) for code, rows in ordered if rows]


def _detail(context: Context, dataset_id: str, split: Split, at: int) -> Detail:
    with context.store.reading() as c:
        dataset = datasets.get(c, dataset_id)
        if dataset is None:
            raise NotFoundError(f"no dataset {dataset_id!r}", param="dataset_id")
        current = datasets.current(c, dataset_id)
        maker = provenance.makers(c, [dataset_id])[dataset_id]
        used = provenance.trained_on(c, [dataset_id]).get(dataset_id, [])
        runs = provenance.runs_on(c, dataset.policy, dataset_id)
    rows, next_at, manifest = ([], None, {}) if current is None else _read(context, current, split, at)
    rules = [(name.replace("_", " "), _rule(value)) for name, value in manifest.get("rules", {}).items()]
    return Detail(dataset, current, maker, used, runs, rules, manifest.get("parent"), rows, next_at)


def _read(context: Context, dataset: Dataset, split: Split, at: int) -> tuple[list[ShownRow], int | None, Mapping[str, Any]]:
    """The rows of one page, where the next one begins, and the manifest."""
    try:
        folder = context.store.artifacts.local(dataset.path)
        path = folder / (snapshot.TRAIN_FILE if split == "train" else snapshot.HELDOUT_FILE)
        rows, next_at = snapshot.read_page(path, at, ROWS_ON_A_PAGE)
        return [_shown(row) for row in rows], next_at, read_manifest(folder)
    except OSError as error:
        raise StoreError(
            f"the folder of {dataset.dataset_id} cannot be read: {error}; `pairloop doctor` looks further"
        ) from error
    except ValueError as error:
        raise InvalidRequestError(str(error), param="at") from error


def _shown(row: TrainingRow) -> ShownRow:
    sides: tuple[tuple[str, str], ...]
    if isinstance(row, PreferencePair):
        sides = (("chosen", row.chosen.text), ("rejected", row.rejected.text))
    elif row.is_demonstration:
        sides = (("ideal answer", row.answers[0].text),)
    else:
        sides = tuple((f"reward {reward:.3g}", side.text) for side, reward in zip(row.answers, row.rewards, strict=True))
    turns = (Message("prompt", row.prompt),) if isinstance(row.prompt, str) else spoken(row.prompt)
    return ShownRow(row.row_id, turns, sides, row.source.value, row.sampled_by, row.group_ids)


def _rule(value: Any) -> str:
    if value is None:
        return "no limit"
    if value in ([], {}, ()):
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
