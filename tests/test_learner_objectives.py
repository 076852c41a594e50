"""The objectives as settings of the trainer: names, options, and which of them go together."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.learner_rig import MakeJob, job_maker, recorded, rows_of, text_pairs
from tests.objective_by_hand import random_batch
from tests.tiny_models import byte_tokenizer, write_model

from pairloop.config import TrainSection
from pairloop.config.train import OPTIONS, READ_BY, ObjectiveName
from pairloop.learner import train
from pairloop.learner.step import objective_settings
from pairloop.objective import OBJECTIVES, ObjectiveSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tokenizer=byte_tokenizer(), gain=3.0)


@pytest.fixture
def make_job(tmp_path: Path, base: Path) -> MakeJob:
    return job_maker(tmp_path, base)


def test_every_objective_is_a_setting_and_every_option_of_theirs_a_key() -> None:
    assert set(get_args(ObjectiveName)) == OBJECTIVES.keys()
    options = {field.name: field.default for field in fields(ObjectiveSettings)}
    assert {name: TrainSection.model_fields[name].default for name in options} == options
    changed = TrainSection(objective="dpo", beta=0.7, label_smoothing=0.2, nll_weight=3.0, token_clip=1.0)
    found = objective_settings(changed)
    assert {name: getattr(found, name) for name in options} == {name: getattr(changed, name) for name in options}
    assert found != ObjectiveSettings()
    assert OPTIONS | {"beta"} == options.keys()


OTHER: dict[str, Any] = {
    "label_smoothing": 0.3,
    "nll_weight": 0.7,
    "length_normalized": True,
    "token_clip": 0.05,
    "importance": "sequence",
    "max_importance": 1.2,
    "ld_alpha": 0.1,
    "dpop_weight": 1.0,
    "simpo_margin": 1.5,
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
    "clip_low": 0.01,
    "clip_high": 0.01,
    "kl_weight": 0.5,
    "advantage_std": "none",
    "loss_mean": "sum",
}


@pytest.mark.parametrize("name", sorted(READ_BY))
def test_the_configuration_knows_which_options_an_objective_reads(name: str) -> None:
    """An option is read where a change of it changes the loss, of this batch or of one with importance weights."""
    batch = random_batch(3, [2] * 12, tokens=5, drift=0.4)
    read = set()
    for importance in ("none", "sequence"):
        plain = ObjectiveSettings(importance=importance)
        before = OBJECTIVES[name](batch, plain)[0]
        read |= {
            key
            for key, value in OTHER.items()
            if not torch.equal(OBJECTIVES[name](batch, replace(plain, **{key: value}))[0], before)
        }
    assert read == READ_BY[name]
    assert OTHER.keys() == OPTIONS


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"objective": "simpo", "token_clip": 1.0}, "objective 'simpo' does not read token_clip"),
        ({"objective": "dr_grpo", "advantage_std": "sample"}, "objectives that do: grpo, dapo"),
        ({"objective": "dpo", "clip_low": 0.1, "ld_alpha": 0.2}, "no objective reads them all"),
        ({"max_length_ratio": 0.9}, "a round starts at 1"),
        ({"objective": "ppo"}, "Input should be 'dpo'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_the_reason(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainSection.model_validate(data)


def test_the_control_takes_the_place_of_any_objective_under_its_settings() -> None:
    assert TrainSection(objective="sft", nll_weight=1.0, token_clip=1.0, clip_low=0.1).objective == "sft"


def test_importance_weights_need_to_know_what_sampled(make_job: MakeJob, base: Path) -> None:
    error = train(make_job(text_pairs(8), recipe={"importance": "sequence"})).error
    assert error is not None
    assert (error.code, error.kind) == ("bad_settings", "user_error")
    assert "none of these came with the log-probs" in error.message
    known = make_job(recorded(text_pairs(8), base), name="known", recipe={"importance": "sequence"})
    assert train(known).error is None


@pytest.mark.parametrize("objective", ["grpo", "kto", "ipo"])
def test_other_objectives_train_on_the_same_pairs(make_job: MakeJob, base: Path, objective: str) -> None:
    job = make_job(recorded(text_pairs(16), base), text_pairs(4, start=16), recipe={"objective": objective})
    result = train(job)
    assert result.error is None
    assert rows_of(job)[-1]["margin"] > 0
    assert result.heldout_after["pair_loss"] < result.heldout_before["pair_loss"]
