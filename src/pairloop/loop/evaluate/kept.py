"""The few samples of a report that are kept, to be read beside one another. Nothing is sampled for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from pairloop.errors import PairloopError
from pairloop.store import Store, samples
from pairloop.store.samples import Sample
from pairloop.types import Completion, Group, Version


def pairs(
    prompts: Sequence[Group], new: Sequence[Completion], old: Sequence[Completion], champion: Version, *, most: int
) -> list[Sample]:
    """The first answer of each of the two to each of the first ``most`` prompts."""
    few = zip(prompts[:most], new, old, strict=False)
    return [Sample(group.group_id, champion.number, ours.text, theirs.text) for group, ours, theirs in few]


def keep(store: Store, version: Version, rows: Sequence[Sample]) -> str | None:
    """Store them without what is taken out of texts, in place of those of an earlier report; a sentence where that failed."""
    try:
        redactor = store.redactor
        if redactor is not None:
            rows = [replace(one, ours=redactor.text(one.ours), theirs=redactor.text(one.theirs)) for one in rows]
        store.write(lambda c: samples.put(c, version.policy, version.number, rows, datetime.now(UTC)))
    except PairloopError as error:
        return f"no sample answers were kept: {error}"
    return None
