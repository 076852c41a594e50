"""From a job's files to the rows it trains on, or to everything that is wrong with them. Large files are read by a process of
their own (`loop.apart`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pairloop.config import Config
from pairloop.errors import RowProblem, UserError
from pairloop.formats import ReadResult, read_rows, snapshot
from pairloop.loop import pairs
from pairloop.loop.apart import apart
from pairloop.loop.jobs.dataset import Rows
from pairloop.loop.pairs.rows import refuse_empty
from pairloop.policy.engine import FAKE_MODEL, resolve_model
from pairloop.policy.fake import FakeTokens
from pairloop.template import ChatTemplate
from pairloop.types import Group

SMALL_BYTES = 1_000_000
"""Files up to this size together are read by the thread that asks: a process takes a second to start."""
PROMPTS = "prompts"
"""The family of rows that are prompts alone."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file to read: where it lies, what its client called it, and the field of the job that names it."""

    path: str
    filename: str
    param: str


@dataclass(frozen=True, slots=True)
class Order:
    """What to read, for which objective; without one the rows are prompts. The snapshot goes to ``folder``."""

    config: Config
    objective: str | None
    training: Source
    validation: Source | None
    folder: Path


@dataclass(frozen=True, slots=True)
class Found:
    """What the files hold: how many rows to train on and held out, and what was set aside; or why they cannot be used.

    ``refused`` counts rows by reason, ``problems`` are all of them, of the file that ``param`` names. ``code`` and ``message``
    say what is wrong with the rows as a whole.
    """

    rows: int
    train: int = 0
    heldout: int = 0
    counts: Mapping[str, int] | None = None
    dropped: Mapping[str, int] | None = None
    param: str | None = None
    refused: Mapping[str, int] | None = None
    problems: Sequence[RowProblem] = ()
    code: str | None = None
    message: str | None = None


def read(order: Order, should_stop: Callable[[], bool]) -> Found | None:
    """Do what ``order`` says, here or in a process; None where ``should_stop`` said so."""
    sources = [source for source in (order.training, order.validation) if source is not None]
    if sum(Path(source.path).stat().st_size for source in sources) <= SMALL_BYTES:
        return _read(order)
    return apart(partial(_read, order), should_stop, doing="reading the rows")


def prompts_of(config: Config, source: Source) -> list[Group]:
    """The prompts of a job whose answers are sampled and scored by a verifier, which were validated before."""
    return [labelled.group for labelled in _read_file(config, source, family=PROMPTS).groups]


def _read(order: Order) -> Found:
    files: list[ReadResult] = []
    for source in (order.training, order.validation):
        if source is None:
            continue
        result = _read_file(order.config, source, family=PROMPTS if order.objective is None else None)
        if result.problems:
            problems = [replace(problem, file=source.filename) for problem in result.problems]
            return Found(result.rows, param=source.param, refused=result.refused, problems=problems)
        files.append(result)
    if order.objective is None:
        return Found(files[0].rows, counts={"prompts": len(files[0].groups)}, dropped={})
    try:
        rows = _compiled(order, order.objective, files)
    except UserError as error:
        code, param = getattr(error, "code", None), getattr(error, "param", None)
        return Found(files[0].rows, param=param or "training_file", code=code or "unfit_rows", message=str(error))
    snapshot.write_folder(order.folder, rows.train, rows.heldout)
    return Found(rows.read, len(rows.train), len(rows.heldout), rows.counts, rows.dropped)


def _compiled(order: Order, objective: str, files: Sequence[ReadResult]) -> Rows:
    training, *validation = files
    split = pairs.PairRules.of(order.config, split_prompts=not validation)
    compiled = refuse_empty(pairs.compile_rows(training.groups, split, objective), objective)
    heldout = compiled.heldout
    if validation:
        whole = pairs.PairRules.of(order.config, split_prompts=False)
        measured = pairs.compile_rows(validation[0].groups, whole, objective)
        heldout = refuse_empty(measured, objective, param="validation_file").train
    return Rows(compiled.train, heldout, training.rows, compiled.counts, compiled.dropped)


def _read_file(config: Config, source: Source, *, family: str | None) -> ReadResult:
    """What a file holds, held also against the model's template and ``train.max_length``."""
    model = config.policy.model
    return read_rows(
        Path(source.path),
        family=family,
        max_chars=config.pairs.max_chars,
        tokens=FakeTokens() if model == FAKE_MODEL else ChatTemplate.load(resolve_model(model)),
        max_length=config.train.max_length,
        policy=config.policy.name,
    )
