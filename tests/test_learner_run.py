"""A run of the learner from job to result file: refused pairs, errors, and going on after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.learner_rig import MakeJob, cut_after, job_maker, recorded, rows_of, same, text_pairs, weights_of
from tests.tiny_models import byte_tokenizer, write_model

from pairloop.formats import snapshot
from pairloop.learner import TrainJob, TrainResult, train
from pairloop.learner.data import Limits, tokenize
from pairloop.learner.job import TrainStatus, last_checkpoint
from pairloop.learner.supervise import classify
from pairloop.template import ChatTemplate
from pairloop.types import PairSide


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tokenizer=byte_tokenizer(), gain=3.0)


@pytest.fixture
def make_job(tmp_path: Path, base: Path) -> MakeJob:
    return job_maker(tmp_path, base)


# ---- what cannot be used


def test_every_pair_that_is_not_used_has_a_reason(base: Path) -> None:
    good, long_, refused, empty, unknown, same_, light = text_pairs(7)
    pairs = [
        good,
        replace(long_, rejected=PairSide("x" * 200)),
        replace(refused, prompt=()),
        replace(empty, prompt_token_ids=(1,), chosen=PairSide("", (), ()), rejected=PairSide("", (0,), (-1.0,))),
        replace(unknown, chosen=PairSide("?", (999,), (-1.0,))),
        replace(same_, chosen=same_.rejected),
        replace(light, weight=0.0),
    ]
    usable, dropped = tokenize(pairs, ChatTemplate.load(base), Limits(100, 257), parent_version=0)
    assert [pair.group_id for pair in usable] == ["pair_0"]
    assert dropped == {"over_long": 1, "template_refused": 1, "same_tokens": 2, "unknown_token": 1, "no_weight": 1}


def test_over_long_pairs_are_refused_and_counted(make_job: MakeJob) -> None:
    long_ = replace(text_pairs(1)[0], pair_id="long", rejected=PairSide("x" * 300))
    result = train(make_job([*text_pairs(8), long_]))
    assert (result.pairs, result.dropped) == (8, {"over_long": 1})


@pytest.mark.parametrize("count", [0, 7])
def test_too_few_pairs_are_nothing_to_train(make_job: MakeJob, count: int) -> None:
    job = make_job(text_pairs(count))
    result = train(job)
    assert (result.status, result.error, result.exit_code, result.pairs) == (TrainStatus.NOTHING_TO_TRAIN, None, 0, count)
    assert not Path(job.out_dir).exists()
    assert TrainResult.load(Path(job.result_path)) == result


def test_too_few_usable_pairs_are_nothing_to_train(make_job: MakeJob) -> None:
    result = train(make_job(text_pairs(8), recipe={"max_length": 16}))
    assert (result.status, result.dropped) == (TrainStatus.NOTHING_TO_TRAIN, {"over_long": 8})


# ---- errors


def test_divergence_ends_with_the_code_nan(make_job: MakeJob) -> None:
    job = make_job(text_pairs(16), recipe={"learning_rate": 1e30, "warmup_steps": 0})
    result = train(job)
    assert result.error is not None
    assert (result.error.code, result.error.kind, result.exit_code) == ("nan", "user_error", 2)
    assert "learning_rate" in result.error.message
    rows = rows_of(job)
    assert [row["loss"] is None or row["grad_norm"] is None for row in rows[-3:]] == [True] * 3
    assert not Path(job.out_dir).exists()


def test_a_broken_model_is_the_users_error(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    error = train(make_job(text_pairs(8), base_dir=str(tmp_path / "empty"))).error
    assert error is not None
    assert (error.code, error.kind) == ("bad_model", "user_error")
    assert "config.json is missing" in error.message


def test_a_broken_snapshot_is_the_users_error(make_job: MakeJob) -> None:
    job = make_job(text_pairs(8))
    with Path(job.snapshot_dir, "train.jsonl").open("a") as file:
        file.write('{"input": {}}\n')
    error = train(job).error
    assert error is not None
    assert (error.code, error.kind) == ("bad_rows", "user_error")
    assert "train.jsonl:9" in error.message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_the_machines_error(make_job: MakeJob) -> None:
    result = train(replace(make_job(text_pairs(8)), metrics_path="/dev/full"))
    assert result.error is not None
    assert (result.error.code, result.error.kind, result.exit_code) == ("disk_full", "system_error", 1)


def test_too_little_memory_is_the_machines_error() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert classify(caught.value).code == "out_of_memory"
    assert classify(MemoryError()).kind == "system_error"
    assert classify(ZeroDivisionError("x")).code == "crash"


# ---- going on


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_gives_the_same_bits(make_job: MakeJob, base: Path, method: str) -> None:
    pairs, heldout = [*recorded(text_pairs(12), base), *text_pairs(12, start=12)], text_pairs(4, start=24)
    recipe = {"checkpoint_every": 3}
    straight, cut = (make_job(pairs, heldout, name=name, recipe=recipe, method=method) for name in ("straight", "cut"))
    whole = train(straight)
    with pytest.raises(KeyboardInterrupt):
        train(cut, cut_after(8))
    assert last_checkpoint(Path(cut.checkpoint_dir)) == (6, Path(cut.checkpoint_dir, "step-00000006"))
    result = train(cut)
    assert (result.resumed_from, result.steps) == (6, whole.steps)
    assert same(weights_of(cut), weights_of(straight))
    assert result.heldout_after == whole.heldout_after
    timeless = [[{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows_of(job)] for job in (cut, straight)]
    assert timeless[0] == timeless[1]


def test_a_checkpoint_of_other_data_is_refused(make_job: MakeJob) -> None:
    job = make_job(text_pairs(16), recipe={"checkpoint_every": 2})
    with pytest.raises(KeyboardInterrupt):
        train(job, cut_after(3))
    snapshot.write(Path(job.snapshot_dir, "train.jsonl"), text_pairs(16, start=1))
    error = train(job).error
    assert error is not None
    assert (error.code, error.kind) == ("checkpoint_mismatch", "user_error")


def test_a_finished_run_is_not_done_again(make_job: MakeJob) -> None:
    job = make_job(text_pairs(8))
    first = train(job)
    before = Path(job.out_dir, "model.safetensors").stat().st_mtime_ns
    assert train(job) == first
    assert Path(job.out_dir, "model.safetensors").stat().st_mtime_ns == before


def child(job: TrainJob) -> subprocess.Popen[bytes]:
    path = Path(job.result_path).parent
    path.mkdir(exist_ok=True)
    job.save(path / "job.json")
    return subprocess.Popen([sys.executable, "-m", "pairloop.learner", str(path / "job.json")])


@pytest.mark.slow
def test_a_killed_child_goes_on_to_the_same_bits(make_job: MakeJob) -> None:
    """kill -9 of the real process after its first checkpoint; what goes on ends where an unbroken run ends."""
    recipe = {"checkpoint_every": 10, "epochs": 20}
    straight, killed = (make_job(text_pairs(24), name=name, recipe=recipe) for name in ("straight", "killed"))
    process = child(killed)
    while last_checkpoint(Path(killed.checkpoint_dir)) is None:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Path(killed.out_dir).exists()
    result = train(killed)
    assert result.error is None
    assert result.resumed_from >= 10
    assert train(straight).error is None
    assert same(weights_of(killed), weights_of(straight))
