"""Where the new pairs are compiled: here where they are few, in a process of its own where they are many (ADR 0025).

Both do the same and leave the same files; a server keeps only their tally.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa

from pairloop.config import Config
from pairloop.formats import snapshot
from pairloop.formats.snapshot import HELDOUT_FILE, TRAIN_FILE
from pairloop.loop.apart import apart
from pairloop.loop.pairs.fresh import Tally, compile_new
from pairloop.loop.pairs.rules import CompiledRows
from pairloop.policy.protocols import Tokens
from pairloop.store import Store, datasets, passed_over
from pairloop.store.datasets import PairLineage
from pairloop.store.reader import Readable
from pairloop.store.schema import feedback as feedback_table

MANY_ROWS = 2_000
"""More new feedback rows than these are compiled in a process of its own, which takes a second or two to start."""

SET_ASIDE_FILE = "set_aside.jsonl"
"""feedback_id and reason of every row that was not used."""
_LINEAGE_FILE = "lineage.jsonl"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Staged(Tally):
    """The tally, and the snapshot's files in a staged ``folder``: gone at the end of the block, unless they were published."""

    folder: Path
    notes: Path
    """A folder for what the store's rows say, and the snapshot does not need."""

    def lineage(self) -> Iterator[PairLineage]:
        """Where each row comes from, those to train on first; read as it goes."""
        with (self.notes / _LINEAGE_FILE).open(encoding="utf-8") as lines:
            for line in lines:
                pair_id, group_ids, feedback_ids = json.loads(line)
                yield pair_id, group_ids, feedback_ids


def never() -> bool:
    """For those who do not stop."""
    return False


@contextmanager
def staged(
    store: Store, tokens: Tokens | None, config: Config, *, parent: int, should_stop: Callable[[], bool] = never
) -> Iterator[Staged | None]:
    """As `compile_new`, but the rows are in files; None where ``should_stop`` said so before they were."""
    with store.artifacts.stage() as folder, store.artifacts.stage() as notes:
        write = partial(_write, tokens=tokens, config=config, parent=parent, folder=folder, notes=notes)
        yield near_or_apart(store, config, write, parent=parent, should_stop=should_stop)


def near_or_apart(
    store: Store, config: Config, work: Callable[[Readable], T], *, parent: int, should_stop: Callable[[], bool] = never
) -> T | None:
    """What ``work``, which reads all that ``parent`` has not learned from, gives; None where ``should_stop`` said so first.

    ``work`` and what it gives can be pickled; the latter is small. SystemFailure where the process that did it was killed.
    """
    if _new_rows(store, config, parent) <= MANY_ROWS:
        return work(store)
    return apart(partial(work, store.reader()), should_stop, doing=f"compiling the new pairs of {config.policy.name}")


def _new_rows(store: Store, config: Config, parent: int) -> int:
    """How many feedback rows (up to one more than `MANY_ROWS`) and groups again ``parent`` has not learned from."""
    policy, seq = config.policy.name, feedback_table.c.seq
    with store.reading() as c:
        after_seq = datasets.used_seq(c, policy, parent)
        new = sa.select(seq).where(feedback_table.c.policy == policy, seq > after_seq).limit(MANY_ROWS + 1)
        found = c.execute(sa.select(sa.func.count()).select_from(new.subquery())).scalar_one()
        return found + len(passed_over.groups_of(c, policy, parent))


def _write(store: Readable, *, tokens: Tokens | None, config: Config, parent: int, folder: Path, notes: Path) -> Staged:
    new = compile_new(store, tokens, config, parent=parent)
    snapshot.write(folder / TRAIN_FILE, new.compiled.train)
    snapshot.write(folder / HELDOUT_FILE, new.compiled.heldout)
    _write_set_aside(folder / SET_ASIDE_FILE, new.compiled.set_aside)
    _write_lineage(notes / _LINEAGE_FILE, new.compiled)
    return Staged(**{one.name: getattr(new, one.name) for one in fields(Tally)}, folder=folder, notes=notes)


def _write_set_aside(path: Path, set_aside: Mapping[str, str]) -> None:
    rows = ({"feedback_id": feedback_id, "reason": reason} for feedback_id, reason in set_aside.items())
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8", newline="\n")


def _write_lineage(path: Path, compiled: CompiledRows) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in compiled.pairs:
            file.write(json.dumps((row.row_id, row.group_ids, row.feedback_ids)) + "\n")
