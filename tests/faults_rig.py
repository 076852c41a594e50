"""Lives of a loop in processes of their own, which a planned fault may end, and what the store must say after the last one.

A scenario begins where it was prepared or where an earlier life ended, and goes on to its end. Processes are forked from one
that has imported everything, and has no threads.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from io import BytesIO
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from sqlalchemy import Connection
from tests.learner_rig import job_maker, text_pairs
from tests.loop_rig import Rig, open_rig, settings
from tests.test_fine_tuning import pair_rows
from tests.tiny_models import byte_tokenizer, write_model

import pairloop
from pairloop import faults
from pairloop.config import Config
from pairloop.errors import ConflictError, UnavailableError
from pairloop.faults import Fault
from pairloop.learner import checkpoint, train
from pairloop.learner.job import TrainJob
from pairloop.loop import cycle, jobs, label
from pairloop.store import Store, cycles, doctor, duels, runs, versions
from pairloop.store import jobs as job_rows
from pairloop.store import store as store_module
from pairloop.store.clock import shared_now
from pairloop.store.schema import cycle_steps, feedback, leases, metadata, promotions
from pairloop.types import Duel, RunStatus

PATIENCE_S = 60.0
TOLD = "told"
"""A file to which a life writes the id of each pick that the store has acknowledged."""


def labels() -> list[str]:
    """Every label that stands in the source, sorted."""
    found = set()
    for path in Path(pairloop.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "faults.reach" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.reach":
                (argument,) = node.args
                assert isinstance(argument, ast.Constant), f"{path}:{node.lineno}: a label is written out, so that it is found"
                found.add(str(argument.value))
    return sorted(found)


@dataclass(frozen=True)
class Scenario:
    """``prepare`` makes the state once; ``live`` goes on with it to the end, from wherever an earlier life left it."""

    configure: Callable[[Path], Config] | None
    prepare: Callable[[Path], None]
    live: Callable[[Path], None]
    tell: Callable[[Path], dict[str, Any]]
    broken: Callable[[Path], list[str]] = lambda _: []
    """What must not be so right after a death, before anybody goes on."""


# --- cycles


def fault_config(folder: Path, **sections: dict[str, Any]) -> Config:
    schedule = {"lease": "1s", "min_pairs": 0}
    return settings(folder, evaluate={"prompts": 8}, schedule=schedule, **sections)


def offline(folder: Path) -> Config:
    """The verifier labels and judges: from feedback to a promotion without traffic."""
    return fault_config(folder, gate={"offline": True}, label={"verifier": "tests.loop_rig:score"})


def duelling(folder: Path) -> Config:
    database = folder / "database"
    store = {"store": {"database": database.read_text()}} if database.exists() else {}
    return fault_config(folder, gate={"min_picks": 50, "max_picks": 200}, **store)


def rejecting(folder: Path) -> Config:
    return fault_config(folder, gate={"max_kl_to_base": 0.001})


def owner() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _prepare_offline(folder: Path) -> None:
    with open_rig(offline(folder)) as rig:
        rig.serve(20, gate_n=200)
        rig.serve(20, train=None, gate=None)


def _prepare_picks(configure: Callable[[Path], Config], folder: Path) -> None:
    with open_rig(configure(folder)) as rig:
        rig.serve(40)


def _no_traffic(_: Rig) -> None:
    return None


def turn(configure: Callable[[Path], Config], folder: Path, *, meanwhile: Callable[[Rig], None] = _no_traffic) -> None:
    """Turn the loop as a scheduler would until the cycle has ended: again where the store was away, or another has the turn.

    ``meanwhile``: what happens between two looks.
    """
    pause, until_s = threading.Event(), time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        try:
            with open_rig(configure(folder), owner=owner()) as rig:
                _turn_rig(rig, folder / TOLD, until_s, meanwhile)
                return
        except (UnavailableError, ConflictError) as error:
            print(f"{os.getpid()}: {type(error).__name__}: {error}", flush=True)
            pause.wait(0.05)
    raise TimeoutError("the cycle did not end")


def _turn_rig(rig: Rig, told: Path, until_s: float, meanwhile: Callable[[Rig], None]) -> None:
    while time.monotonic() < until_s:
        with rig.store.reading() as c:
            newest = next(iter(cycles.list_(c, rig.loop.name, limit=1)), None)
        if newest is not None and newest.state.is_terminal:
            return
        # As a scheduler does: the one that was open a moment ago is gone on with, and no new one begins in its name.
        cycle.run(rig.loop, trigger="test", only=None if newest is None else newest.cycle_id)
        meanwhile(rig)
        with rig.store.reading() as c:
            duel = duels.current(c, rig.loop.name)
        if duel is not None:  # another worker may end it meanwhile: then these picks come too late, and are kept all the same
            with told.open("a") as file:
                for _ in range(30):
                    file.write("".join(f"{pick}\n" for pick in rig.judge(1, duel=duel)))
                    file.flush()


def tell_cycles(configure: Callable[[Path], Config], folder: Path) -> dict[str, Any]:
    """What must be the same however often the life was cut short."""
    config = configure(folder)
    told = (folder / TOLD).read_text().split() if (folder / TOLD).exists() else []
    with Store.open(config) as store, store.reading() as c:
        stored = Counter(c.execute(sa.select(feedback.c.feedback_id)).scalars())
        key = (feedback.c.group_id, feedback.c.rater_id, feedback.c.metric, feedback.c.choice_index)
        doubled = c.execute(sa.select(*key).group_by(*key).having(sa.func.count() > 1)).all()
        positions = c.execute(sa.select(cycle_steps.c.cycle_id, cycle_steps.c.position)).all()
        return {
            "cycles": [[str(step.state) for step in one.steps] for one in cycles.list_(c, config.policy.name)],
            "steps doubled": len(positions) - len(set(positions)),
            "versions": [(one.number, one.parent) for one in versions.list_(c, config.policy.name)],
            "moves": [(row.action, row.number) for row in c.execute(sa.select(promotions).order_by(promotions.c.seq))],
            "runs going on": sum(run.status is RunStatus.RUNNING for run in runs.list_(c, config.policy.name)),
            "picks lost": [one for one in told if stored[one] != 1],
            "picks doubled": [tuple(row) for row in doubled],
            "problems": [problem.text for problem in doctor.check(store)],
            "broken artifacts": broken_artifacts(store),
        }


def broken_artifacts(store: Store) -> list[str]:
    """Folders that are neither whole nor under ``tmp``: nobody may ever find one."""
    found = [path for path in store.artifacts.root.iterdir() if path.name not in ("tmp", "files")]
    return [path.name for path in found if not store.artifacts.is_whole(path.name)]


def _cycles(prepare: Callable[[Path], None], configure: Callable[[Path], Config]) -> Scenario:
    return Scenario(configure, prepare, partial(turn, configure), partial(tell_cycles, configure))


# --- a fine-tuning job


def _prepare_job(folder: Path) -> None:
    with open_rig(fault_config(folder)):
        pass


def _live_job(folder: Path) -> None:
    with open_rig(fault_config(folder), owner=owner()) as rig:
        with rig.store.reading() as c:
            made = list(job_rows.walk(c))
        if not made:
            ask_for_job(rig, 64, model="bot", n_epochs=2)
        work_on_job(rig)


def ask_for_job(rig: Rig, rows: int, *, model: str, **hyperparameters: int) -> None:
    store, config = rig.store, rig.loop.config
    file = jobs.upload(store, config, BytesIO(pair_rows(rows)), filename="rows.jsonl", purpose="fine-tune")
    method = {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
    body = {"training_file": file.file_id, "model": model, "method": method, "seed": 7}
    jobs.create(store, config, jobs.JobRequest.model_validate(body))


def work_on_job(rig: Rig) -> None:
    """As a worker does, until the one job has ended."""
    pause, until_s = threading.Event(), time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        with rig.store.reading() as c:
            (job,) = job_rows.walk(c)
        if job.status.is_terminal:
            return
        try:
            if not jobs.validate_next(rig.loop) and not jobs.train_next(rig.loop, lambda: False):
                pause.wait(0.05)
        except UnavailableError as error:
            print(error, flush=True)
    raise TimeoutError("the job did not end")


def _tell_job(folder: Path) -> dict[str, Any]:
    with Store.open(fault_config(folder)) as store, store.reading() as c:
        found = [(str(job.status), job.error, len(job.result_files)) for job in job_rows.walk(c)]
        made = [(one.number, one.step_number) for one in versions.list_(c, "bot", checkpoints=True)]
        problems = [problem.text for problem in doctor.check(store)]
        return {"jobs": found, "versions": made, "problems": problems, "broken artifacts": broken_artifacts(store)}


# --- the learner, with a real (tiny) model


def _prepare_learner(folder: Path) -> None:
    base = write_model(folder / "base", tokenizer=byte_tokenizer(), gain=3.0)
    make = job_maker(folder, base)
    make(text_pairs(16), text_pairs(4, start=16), recipe={"checkpoint_every": 2}).save(folder / "job.json")


def _learner_job(folder: Path) -> TrainJob:
    """The job as it was prepared, with its places under ``folder``."""
    path = folder / "job.json"
    prepared = str(Path(TrainJob.load(path).snapshot_dir).parent)
    path.write_text(path.read_text().replace(prepared, str(folder)))
    return TrainJob.load(path)


def _live_learner(folder: Path) -> None:
    result = train(_learner_job(folder))
    if result.error is not None:  # as of a full disk: the parent starts it again
        print(result.error, flush=True)
        result = train(_learner_job(folder))
    assert result.error is None, result.error


def _tell_learner(folder: Path) -> dict[str, Any]:
    job = _learner_job(folder)
    out = {path.name: path.read_bytes() for path in Path(job.out_dir).iterdir() if path.suffix == ".safetensors"}
    return {"weights": out, "steps": Path(job.metrics_path).read_text().count('"tokens"')}


SCENARIOS = {
    "offline": _cycles(_prepare_offline, offline),
    "duel": _cycles(partial(_prepare_picks, duelling), duelling),
    "rejected": _cycles(partial(_prepare_picks, rejecting), rejecting),
    "job": Scenario(fault_config, _prepare_job, _live_job, _tell_job),
    "learner": Scenario(None, _prepare_learner, _live_learner, _tell_learner),
}


# --- processes


@dataclass
class Life:
    """A process that lives a scenario."""

    process: BaseProcess
    _log: Path

    def end(self) -> int:
        """Waits for it; its exit code, or minus the signal that killed it."""
        self.process.join(PATIENCE_S + 10)
        assert self.process.exitcode is not None, f"still alive: {self.log}"
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    @property
    def is_stopped(self) -> bool:
        return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED

    def go_on(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")[-4_000:]


_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(
    ["tests.faults_deploy", "tests.faults_elsewhere", "tests.faults_keeping", "pairloop.learner.loop"]
)


Plant = Callable[[], None]
"""Done in a life's process before it begins, to show that the checks can fail; a function that can be pickled."""


def begin(name: str, folder: Path, fault: Fault | None = None, plant: Plant | None = None, *, log: Path | None = None) -> Life:
    """A life of the scenario, with or without a fault planned for it and its training process."""
    log = log or folder / "log"
    log.touch()
    process = _forking.Process(target=_live, args=(SCENARIOS[name].live, folder, fault, plant, log), daemon=True)
    process.start()
    return Life(process, log)


def _live(live: Callable[[Path], None], folder: Path, fault: Fault | None, plant: Plant | None, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if fault is not None:
        os.environ[faults.ENVIRONMENT] = fault.as_json()
        faults.plant(fault)
    if plant is not None:
        plant()
    live(folder)


@dataclass
class Prepared:
    """Each scenario's beginning, and what its undisturbed life came to; made once, on demand."""

    root: Path
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)
    visits: dict[str, list[str]] = field(default_factory=dict)
    _copies: int = 0

    def undisturbed(self, name: str) -> dict[str, Any]:
        if name not in self.ends:
            folder, trace = self.copy(name), self.root / f"{name}.trace"
            life = begin(name, folder, Fault(trace=str(trace)))
            assert life.end() == 0, life.log
            self.visits[name] = sorted(set(trace.read_text().split()))
            self.ends[name] = SCENARIOS[name].tell(folder)
        return self.ends[name]

    def visited(self, name: str) -> list[str]:
        """The labels that an undisturbed life reaches."""
        self.undisturbed(name)
        return self.visits[name]

    def copy(self, name: str) -> Path:
        """The scenario's beginning, in a folder of its own."""
        beginning = self.root / name
        if not beginning.exists():
            beginning.mkdir()
            SCENARIOS[name].prepare(beginning)
        self._copies += 1
        folder = self.root / f"{name}-{self._copies}"
        shutil.copytree(beginning, folder)
        return folder


@contextmanager
def same_end(prepared: Prepared, name: str) -> Iterator[Path]:
    """A fresh copy to live in; whatever was done to its lives, it must have come to the undisturbed end."""
    expected = prepared.undisturbed(name)
    folder = prepared.copy(name)
    yield folder
    found = SCENARIOS[name].tell(folder)
    other = {key: (found[key], value) for key, value in expected.items() if found[key] != value}
    assert not other, f"{other}\n{(folder / 'log').read_text(errors='replace')[-4_000:]}"
    shutil.rmtree(folder)


# --- planted, to show that the checks can fail, or that a worker's clock may be wrong


def unfenced() -> None:
    """A worker that does not ask whether it still has its lease, with work left when it is stopped."""
    label.BATCH = 8
    Store.fenced = lambda self, fence: self  # type: ignore[method-assign]  # noqa: ARG005


def published_in_place() -> None:
    """An artifact is copied to its place file by file."""

    def rename(self: Path, target: Path) -> Path:
        target.mkdir()
        for file in sorted(self.iterdir(), reverse=True):
            shutil.copy(file, target)
            faults.reach("planted.halfway")
        shutil.rmtree(self)
        return target

    Path.rename = rename  # type: ignore[assignment, method-assign]


def checkpoints_in_place() -> None:
    """A checkpoint is written where it will be looked for."""

    @contextmanager
    def in_place(target: Path) -> Iterator[Path]:
        target.mkdir(parents=True)
        yield target

    checkpoint.whole_folder = in_place  # type: ignore[attr-defined]


def acknowledged_early() -> None:
    """A pick is acknowledged while it waits to be stored; and the process dies when the first one is to be committed."""
    waiting: list[Callable[[Connection], object]] = []

    class Hasty:
        def __init__(self, store: Store) -> None:
            self.reading, self._store = store.reading, store

        def write(self, fn: Callable[[Connection], object]) -> None:
            if waiting:
                faults.plant(Fault("writer.before_commit"))
                self._store.submit(waiting.pop())
            waiting.append(fn)

    right = Rig.judge

    def judge(self: Rig, n: int, *, duel: Duel) -> list[str]:
        kept, self.store = self.store, Hasty(self.store)  # type: ignore[assignment]
        try:
            return right(self, n, duel=duel)
        finally:
            self.store = kept

    Rig.judge = judge  # type: ignore[assignment, method-assign]


def an_hour_ahead() -> None:
    """A worker by whose clock every other worker's lease has run out."""
    store_module.shared_now = lambda c: shared_now(c) + timedelta(hours=1)  # type: ignore[attr-defined]


def contents(store: Store) -> dict[str, list[Any]]:
    """All rows of all tables, to find out whether anything was written; an owner may always give its own lease back."""
    with store.reading() as c:
        return {
            table.name: sorted(map(repr, c.execute(sa.select(table)).all()))
            for table in metadata.sorted_tables
            if table is not leases
        }
