"""Lists by cursor: ``limit`` items that follow the one named by ``after``; no list reads more than it shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

from fastapi import Query
from pydantic import BaseModel

from pairloop.client.shapes import Page

Limit = Annotated[int, Query(ge=1, le=100, description="Items on a page.")]
After = Annotated[
    str | None, Query(max_length=128, description="The id behind which the page begins: last_id of the one before.")
]
Item = TypeVar("Item", bound=BaseModel)


def page(items: Sequence[Item], *, limit: int) -> Page[Item]:
    """A page of the first ``limit`` of ``items``; one more, if there was one, says that the list goes on."""
    shown = list(items[:limit])
    ids = [str(getattr(item, "id", "")) for item in shown]
    ends = (ids[0], ids[-1]) if ids else (None, None)
    return Page(data=shown, first_id=ends[0], last_id=ends[1], has_more=len(items) > limit)
