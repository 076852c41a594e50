"""A training run that its round controller stops: why, with which weights, and the same after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.learner_rig import MakeJob, cut_after, job_maker, recorded, rows_of, same, text_pairs, weights_of
from tests.tiny_models import byte_tokenizer, write_model

from pairloop.learner import TrainJob, TrainResult, train
from pairloop.learner.checkpoint import BEST
from pairloop.types import PreferencePair


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tokenizer=byte_tokenizer(), gain=3.0)


@pytest.fixture
def make_job(tmp_path: Path, base: Path) -> MakeJob:
    return job_maker(tmp_path, base)


def swapped(pairs: list[PreferencePair]) -> list[PreferencePair]:
    """The same pairs, picked the other way round: what training learns makes their loss rise."""
    return [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]


def looks_of(job: TrainJob) -> dict[int, dict[str, Any]]:
    return {row["step"]: row["heldout"] for row in rows_of(job) if "heldout" in row}


def test_the_ess_budget_ends_the_round_and_says_so(make_job: MakeJob) -> None:
    job = make_job(text_pairs(24), recipe={"learning_rate": 2e-2, "stop_ess": 0.9})
    result = train(job)
    assert result.stopped_because == "ess"
    assert 0 < result.steps < result.steps_planned == 12
    assert result.weights_step == result.steps
    assert "train.stop_ess = 0.9" in result.stop_message
    assert f"up to step {result.steps}" in result.stop_message
    assert Path(job.out_dir, "model.safetensors").exists()
    assert TrainResult.load(Path(job.result_path)) == result


def test_a_low_ess_that_stops_nothing_is_warned_of(make_job: MakeJob) -> None:
    result = train(make_job(text_pairs(24), recipe={"learning_rate": 2e-2}))
    assert (result.stopped_because, result.stop_message) == ("completed", "all passes done, 12 steps")
    assert ["train.warn_ess = 0.8" in text for text in result.warnings] == [True]


def test_answers_that_become_short_end_the_round(make_job: MakeJob, base: Path) -> None:
    pairs = recorded(text_pairs(24), base)
    result = train(make_job(pairs, recipe={"min_length_ratio": 0.9}))
    assert result.stopped_because == "length_ratio"
    assert result.steps < result.steps_planned
    longer = train(make_job(swapped(pairs), name="longer", recipe={"max_length_ratio": 1.1}))
    assert longer.stopped_because == "length_ratio"
    assert train(make_job(swapped(pairs), name="off")).stopped_because == "completed"


def test_looks_are_rows_of_their_own(make_job: MakeJob, base: Path) -> None:
    job = make_job(recorded(text_pairs(24), base), text_pairs(32, start=24), recipe={"heldout_every": 4})
    result = train(job)
    rows = rows_of(job)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "heldout" in row] == [4, 8]
    assert {row["of"] for row in rows} == {12}
    losses = [look["pair_loss"] for look in looks_of(job).values()]
    assert result.heldout_before["pair_loss"] > losses[0] > losses[1] > result.heldout_after["pair_loss"]
    assert result.metrics["loss"] == rows[-1]["loss"]
    silent = make_job(recorded(text_pairs(24), base), text_pairs(32, start=24), name="silent", recipe={"heldout_every": 0})
    assert train(silent).heldout_after == result.heldout_after
    assert looks_of(silent) == {}


def test_a_held_out_loss_that_rises_ends_the_round_with_its_best_weights(make_job: MakeJob, base: Path) -> None:
    recipe = {"heldout_every": 2, "epochs": 4}
    job = make_job(recorded(text_pairs(24), base), swapped(text_pairs(32, start=24)), recipe=recipe)
    result = train(job)
    assert (result.stopped_because, result.steps, result.weights_step) == ("heldout_loss", 4, 2)
    looks = looks_of(job)
    assert list(looks) == [2, 4]
    assert result.heldout_before["pair_loss"] < looks[2]["pair_loss"] < looks[4]["pair_loss"]
    assert result.heldout_after == pytest.approx(looks[2])
    assert "The weights of step 2 are taken" in result.stop_message
    # The last ones are others, and without the rule they are what comes out.
    last = train(
        make_job(recorded(text_pairs(24), base), swapped(text_pairs(32, start=24)), name="on", recipe={"heldout_every": 0})
    )
    assert last.heldout_after["pair_loss"] > looks[4]["pair_loss"]


def test_few_held_out_pairs_do_not_stop_a_round(make_job: MakeJob, base: Path) -> None:
    job = make_job(recorded(text_pairs(24), base), swapped(text_pairs(8, start=24)), recipe={"heldout_every": 2})
    result = train(job)
    assert result.stopped_because == "completed"
    assert any("8 held-out rows are too few" in text for text in result.warnings)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_round_stops_where_the_unbroken_one_does(make_job: MakeJob, base: Path, method: str) -> None:
    """The best weights, the looks so far and the window come back from the checkpoint."""
    pairs, heldout = recorded(text_pairs(24), base), swapped(text_pairs(32, start=24))
    recipe = {"heldout_every": 4, "epochs": 4, "checkpoint_every": 3, "stop_ess": 0.05}
    straight, cut = (make_job(pairs, heldout, name=name, recipe=recipe, method=method) for name in ("straight", "cut"))
    whole = train(straight)
    assert (whole.stopped_because, whole.steps, whole.weights_step) == ("heldout_loss", 8, 4)
    with pytest.raises(KeyboardInterrupt):
        train(cut, cut_after(7))
    assert load_file(Path(cut.checkpoint_dir, "step-00000006", BEST)).keys()
    result = train(cut)
    assert (result.resumed_from, result.steps, result.weights_step) == (6, 8, 4)
    assert (result.stop_message, result.warnings) == (whole.stop_message, whole.warnings)
    assert same(weights_of(cut), weights_of(straight))
    timeless = [[{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows_of(job)] for job in (cut, straight)]
    assert timeless[0] == timeless[1]
