"""The parent's side of a training process: start it, follow its metrics file, stop it. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pairloop
from pairloop.config import TrainSection, child_env
from pairloop.telemetry import logs

DIE_WITH_PARENT = "--die-with-parent"
WORKER = "--worker"
POLL_S = 0.2
STOP_S = 30.0
"""How long a child may take over the step that it is in and a checkpoint, once it is asked to end; then it is killed."""
LOG_TAIL = 2_000

Row = Mapping[str, Any]


@contextmanager
def started(job_path: Path, *, log_path: Path, threads: int) -> Iterator[subprocess.Popen[bytes]]:
    """A training process (with its workers) in a session of its own, so that Ctrl-C reaches only the parent; it is stopped when
    the block ends.

    It also ends when the parent dies in any way, because it then reads the end of its standard input.
    """
    roots = [str(Path(pairloop.__file__).resolve().parent.parent), child_env().get("PYTHONPATH", "")]
    env = child_env(
        PYTHONPATH=os.pathsep.join(root for root in roots if root),
        OMP_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        **logs.environment(),
    )
    with log_path.open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "pairloop.learner", str(job_path), DIE_WITH_PARENT],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        _stop(child)


def wait_for_parents_end() -> None:
    """The parent holds the other end of stdin and writes nothing: the end of file is the parent's end, also by kill -9."""
    os.read(sys.stdin.fileno(), 1)


def launcher(settings: TrainSection, arguments: Sequence[str]) -> list[str] | None:
    """What Python is to run in place of the learner with these arguments, to start all of its processes; None for one alone.

    torchrun hands its own standard input to its workers, so each of them sees the parent's end.
    """
    if settings.launcher == "torchrun":
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={settings.processes}"]
        return ["-m", *torchrun, "-m", "pairloop.learner", *arguments, WORKER]
    if settings.launcher == "ray":
        return ["-m", "pairloop.learner.ray_job", *arguments]
    return None


def follow(
    child: subprocess.Popen[bytes],
    metrics_path: Path,
    on_rows: Callable[[Sequence[Row]], None],
    should_stop: Callable[[], bool],
) -> int | None:
    """Hand over new metrics rows (an empty list where there are none) until the child ends; its exit code.

    None: ``should_stop`` said so; the child still runs.
    """
    offset = 0
    # Asked before the first wait too: a child may be done sooner than that.
    while not should_stop():
        code = _wait(child)
        rows, offset = read_rows(metrics_path, offset)
        on_rows(rows)
        if code is not None:
            return code
    return None


def read_rows(path: Path, offset: int = 0) -> tuple[list[Row], int]:
    """The whole lines of a metrics file from ``offset`` on, and the offset after them."""
    try:
        with path.open("rb") as file:
            # A new attempt has cut off what it does again.
            offset = min(offset, file.seek(0, os.SEEK_END))
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:end].splitlines()], offset + end


def log_tail(path: Path, most: int = LOG_TAIL) -> str:
    """The last lines that the child wrote before it ended, of ``most`` bytes at most."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - most))
            return file.read().decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(timeout=POLL_S)
    except subprocess.TimeoutExpired:
        return None


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdin is not None:
        child.stdin.close()
