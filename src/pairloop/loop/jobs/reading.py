"""From a job's files to the rows it trains on, or to everything that is wrong with them.

Large files are read in a process of their own: millions of small objects would otherwise stop the server's threads for up to a
second at a time (Python collects garbage in all of them at once), and their memory would stay with the server.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from pairloop.config import Config
from pairloop.errors import RowProblem, SystemFailure, UserError
from pairloop.formats import ReadResult, read_rows, snapshot
from pairloop.loop import pairs
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
POLL_S = 0.2


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
    context = multiprocessing.get_context("spawn")
    answers, answer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(order, answer), name="read-rows", daemon=True)
    process.start()
    answer.close()
    try:
        while not answers.poll(POLL_S):
            if should_stop():
                return None
        found = answers.recv()
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, Found)
        return found
    except EOFError as error:
        process.join()
        raise SystemFailure(f"the process that read the rows ended with code {process.exitcode}") from error
    finally:
        process.kill()
        process.join()


def prompts_of(config: Config, source: Source) -> list[Group]:
    """The prompts of a job whose answers are sampled and scored by a verifier, which were validated before."""
    return [labelled.group for labelled in _read_file(config, source, family=PROMPTS).groups]


def _child(order: Order, answer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process
    gc.disable()  # nothing of this is cyclic, and the process ends soon
    try:
        answer.send(_read(order))
    except UserError as error:  # a model or a file that cannot be used: told as where it is read in the caller's thread
        answer.send(error)
    except Exception as error:  # the supervisor line of this process: the parent tells it in the job
        answer.send(SystemFailure(f"the rows could not be read: {type(error).__name__}: {error}"))
        raise


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
