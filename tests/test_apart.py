"""Work in a process of its own: the same as here, and no process that hangs, stays behind or takes the cycle with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.loop_rig import Rig, open_rig, settings

from pairloop.errors import ConflictError, SystemFailure
from pairloop.loop import cycle, pairs, raters
from pairloop.loop.apart import apart
from pairloop.loop.pairs import staging
from pairloop.loop.pairs.fresh import Tally
from pairloop.store import cycles, datasets, doctor
from pairloop.store.quarantines import Action
from pairloop.types import CycleState

TIMEOUT_S = 60.0


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(settings(tmp_path)) as rig:
        yield rig


def never() -> bool:
    return False


def evaluated(text: str) -> Any:
    """Work for another process, that needs no module of the tests."""
    return partial(eval, text)


def raising(text: str) -> Any:
    return partial(exec, f"from pairloop.errors import ConflictError\nraise {text}")


def test_what_it_gives_comes_back_whatever_the_service_is_told() -> None:
    told = "[__import__('signal').raise_signal(n) for n in (2, 15)] and __import__('os').getpid()"
    found = apart(evaluated(told), never, doing="telling")
    assert found not in (None, os.getpid())
    assert multiprocessing.active_children() == []


def test_errors_come_back_but_not_what_a_stranger_says() -> None:
    with pytest.raises(ConflictError, match=r"^both of them$"):
        apart(raising("ConflictError('both of them')"), never, doing="asking")
    with pytest.raises(SystemFailure, match=r"^asking: ValueError \(.*:\d+\)$"):
        apart(raising("ValueError('what a customer wrote')"), never, doing="asking")
    assert multiprocessing.active_children() == []


def test_it_ends_with_the_process_that_asked_for_it() -> None:
    """Its standard output is the parent's: that ends only when both are gone."""
    work = "print('at work', flush=True) or __import__('signal').pause()"
    imports = "from functools import partial; from pairloop.loop.apart import apart"
    code = f"{imports}\napart(partial(eval, {work!r}), bool, doing='waiting')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "at work\n"
        finally:
            parent.kill()
        rest, _ = parent.communicate(timeout=TIMEOUT_S)
    assert (rest, parent.returncode) == ("", -signal.SIGKILL)


def test_many_rows_are_compiled_apart_to_the_same_bytes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.serve(30)
    store, config, tokens = rig.store, rig.loop.config, rig.policy.tokens

    def compiled() -> tuple[dict[str, Any], dict[str, bytes], list[Any]]:
        with pairs.staged(store, tokens, config, parent=0) as new:
            assert new is not None
            tally = {one.name: getattr(new, one.name) for one in fields(Tally)}
            return tally, {path.name: path.read_bytes() for path in new.folder.iterdir()}, list(new.lineage())

    here = compiled()
    monkeypatch.setattr(staging, "MANY_ROWS", 0)
    assert compiled() == here
    tally, files, lineage = here
    assert sorted(files) == ["heldout.jsonl", "set_aside.jsonl", "train.jsonl"]
    assert len(lineage) == tally["counts"]["train_pairs"] + tally["counts"]["heldout_pairs"] > 0
    assert list(rig.store.artifacts.root.joinpath("tmp").iterdir()) == []


@pytest.mark.slow  # another start of a process
def test_a_quarantine_is_previewed_apart_as_it_is_here(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.serve(30)
    with rig.store.reading() as c:
        rater = c.exec_driver_sql("SELECT min(rater_id) FROM feedback").scalar_one()
    here = raters.preview(rig.store, rig.loop.config, rater, Action.QUARANTINE)
    assert here.pairs == 1
    monkeypatch.setattr(staging, "MANY_ROWS", 0)
    assert raters.preview(rig.store, rig.loop.config, rater, Action.QUARANTINE) == here


@contextmanager
def killing() -> Iterator[list[int]]:
    """Kills every process that this one starts by `multiprocessing`, as soon as there is one; their ids.

    It only sends the signal: whoever waits for the process is to read how it ended.
    """
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.01):
            for process in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):
                    if process.pid not in killed and any("spawn_main" in part for part in process.cmdline()):
                        killed.append(process.pid)
                        process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


def test_a_cycle_whose_compiling_process_is_killed_fails_and_its_pairs_stay_usable(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.serve(60)
    rows = 72
    monkeypatch.setattr(staging, "MANY_ROWS", rows - 1)
    with killing() as killed:
        failed = cycle.run(rig.loop, trigger="test")
        assert len(killed) == 1
        assert failed.state is CycleState.FAILED
        record = failed.steps[-1].record
        assert (record["stage"], record["error_kind"]) == ("building", "system_error")
        why = "the process that did it was ended by SIGKILL, as the system does where memory runs out"
        assert record["error"] == f"compiling the new pairs of bot: {why}"
        with rig.store.reading() as c:
            assert datasets.list_(c, "bot") == []
        monkeypatch.setattr(staging, "MANY_ROWS", rows)  # not more than these: here
        dataset = pairs.run(rig.store, rig.policy.tokens, rig.loop.config, cycle_id=None, parent=0)
        assert len(killed) == 1
    assert dataset is not None
    assert dataset.counts["feedback_rows"] == rows
    assert doctor.check(rig.store) == []


def test_a_cycle_that_stops_while_it_compiles_waits_where_it_is(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.serve(60)
    monkeypatch.setattr(staging, "MANY_ROWS", 0)

    def while_compiling() -> bool:
        return bool(multiprocessing.active_children())

    stopped = cycle.run(rig.loop, trigger="test", should_stop=while_compiling)
    assert [step.state for step in stopped.steps] == [CycleState.BUILDING]
    assert multiprocessing.active_children() == []
    with rig.store.reading() as c:
        assert cycles.current(c, "bot") == stopped  # the next start compiles again
