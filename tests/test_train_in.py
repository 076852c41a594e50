"""`run_in`, the one way to train: what it tells, how it is stopped and taken up, and what hyperparameters mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.labelled_groups import NOW, pick, put, row, said, scores
from tests.stores import open_store
from tests.tiny_models import byte_tokenizer, write_model

from pairloop.config import Config, TrainSection, parse_config
from pairloop.config.train import RECIPE
from pairloop.errors import ConfigError, InvalidRequestError, ModelError
from pairloop.formats import snapshot
from pairloop.learner.job import ERROR_CODES, TrainResult, TrainStatus, last_checkpoint
from pairloop.loop import pairs as pairs_stage
from pairloop.loop.train import Start, figures_of, run, run_in, train_settings, with_objective
from pairloop.policy.fake import FakeTokens
from pairloop.store import datasets, versions
from pairloop.types import Label, Message, PairSide, PreferencePair, TrainingGroup, TrainingRow, Version, VersionKind

Row = Mapping[str, Any]


def pairs(count: int, start: int = 0) -> list[TrainingRow]:
    return [
        PreferencePair(
            f"pair_{i}", (Message("user", f"what is {i}?"),), PairSide(f"answer 8{i % 10}"), PairSide(f"answer 1{i % 10}")
        )
        for i in range(start, start + count)
    ]


def demonstrations(count: int) -> list[TrainingRow]:
    return [TrainingGroup(f"demo_{i}", f"what is {i}?", (PairSide(f"answer 9{i % 10}"),)) for i in range(count)]


def scored(count: int) -> list[TrainingRow]:
    return [
        TrainingGroup(
            f"scored_{i}", f"what is {i}?", tuple(PairSide(f"answer {n}{i % 10}") for n in (9, 5, 1)), (1.0, 0.5, 0.0)
        )
        for i in range(count)
    ]


class Told:
    """Who asked for a run: hears everything, and says when it is to stop."""

    def __init__(self, folder: Path, config: Config | None = None) -> None:
        self.folder, self.config = folder, config or Config()
        self.rows: list[Row] = []
        self.checkpoints: list[tuple[int, Path, Row]] = []

    def run(self, rows: list[TrainingRow], heldout: list[TrainingRow] | None = None, **settings: Any) -> TrainResult:
        data = self.folder.parent / f"{self.folder.name}-data"
        snapshot.write_folder(data, rows, heldout or [])
        defaults: dict[str, Any] = {"start": Start("fake"), "keep_epochs": True}
        return run_in(
            self.folder,
            self.config,
            data=data,
            on_progress=self.rows.append,
            on_checkpoint=lambda *told: self.checkpoints.append(told),
            **{**defaults, **settings},
        )


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path / "run")


# --- what it tells


def test_every_epoch_is_told_with_its_model_and_figures(told: Told) -> None:
    result = told.run(pairs(20), pairs(4, start=20), train=TrainSection(epochs=3))
    assert (result.status, result.steps, result.pairs) == (TrainStatus.SUCCEEDED, 6, 20)
    assert [step for step, _, _ in told.checkpoints] == [2, 4, 6]
    texts = set()
    for step, folder, figures in told.checkpoints:
        assert folder == told.folder / "epochs" / f"step-{step:08d}"
        assert json.loads((folder / "fake.json").read_text()) == {"skill": 1}
        texts.add("".join(path.read_text() for path in sorted(folder.iterdir())))
        assert figures.keys() == {"step", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"}
        assert figures["step"] == step
        assert figures["valid_accuracy"] == 1.0
    assert len(texts) == 3
    steps = [row for row in told.rows if "tokens" in row]
    assert result.trained_tokens == sum(row["tokens"] for row in steps)
    assert json.loads((told.folder / "out" / "fake.json").read_text()) == {"skill": 1}
    # Asked again, it is told again, and nothing is trained.
    before = len(told.rows)
    assert told.run(pairs(20), pairs(4, start=20), train=TrainSection(epochs=3)) == result
    assert told.rows[before:] == told.rows[:before]
    assert told.checkpoints[3:] == told.checkpoints[:3]


def test_figures_are_what_the_data_define(told: Told) -> None:
    told.run(pairs(16), pairs(4, start=16))
    step = figures_of(told.rows[0])
    assert step.keys() == {
        "step",
        "of",
        "train_loss",
        "train_accuracy",
        "rewards_chosen",
        "rewards_rejected",
        "rewards_margin",
        "learning_rate",
        "tokens",
    }
    assert step["rewards_margin"] == pytest.approx(step["rewards_chosen"] - step["rewards_rejected"])
    demos = Told(told.folder.with_name("demos"))
    result = demos.run(demonstrations(16), demonstrations(4), train=TrainSection(objective="sft"))
    assert result.error is None
    assert not {"train_accuracy", "rewards_rejected", "rewards_margin"} & figures_of(demos.rows[0]).keys()
    assert [figures.keys() for _, _, figures in demos.checkpoints] == [{"step", "train_loss", "valid_loss"}]


def test_accuracy_and_margin_are_of_the_groups_that_compare(told: Told) -> None:
    """Eight pairs and eight demonstrations in one batch: what is a sum over all is given for the half that has it."""
    told.run([*pairs(8), *demonstrations(8)], train=TrainSection(objective="sft", epochs=2))
    figures = figures_of([row for row in told.rows if "tokens" in row][-1])
    assert figures["train_accuracy"] == 1.0
    assert told.rows[-2]["accuracy"] == 0.5


def test_scored_groups_train(told: Told) -> None:
    result = told.run(scored(16), scored(4), train=TrainSection(objective="grpo"))
    assert (result.status, result.heldout_after["compared"]) == (TrainStatus.SUCCEEDED, 4)
    assert result.heldout_after["margin"] > 0 == result.heldout_before["margin"]


@pytest.mark.parametrize(
    ("objective", "rows"), [("dpo", demonstrations(16)), ("dpo", scored(16)), ("grpo", demonstrations(16))]
)
def test_what_does_not_fit_is_a_user_error_with_a_code(told: Told, objective: str, rows: list[TrainingRow]) -> None:
    result = told.run(rows, train=with_objective(TrainSection(), objective))
    assert result.status is TrainStatus.FAILED
    assert result.error is not None
    assert (result.error.code, result.error.kind) == ("unfit_rows", ERROR_CODES["unfit_rows"]) == ("unfit_rows", "user_error")


def test_a_start_that_is_not_there_or_does_not_go_together(told: Told, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        told.run(pairs(16), start=Start("./nowhere"))
    config = parse_config({"policy": {"method": "full"}})
    with pytest.raises(ConfigError, match=r'policy.method = "full".*kind adapter'):
        Told(told.folder, config).run(pairs(16), start=Start("fake", tmp_path, VersionKind.ADAPTER, 3))


# --- how it is stopped


def test_a_pause_is_taken_up(told: Told) -> None:
    paused = told.run(pairs(20), should_stop=lambda: True)
    assert (paused.status, paused.error, paused.exit_code) == (TrainStatus.PAUSED, None, 0)
    assert not (told.folder / "result.json").exists()
    assert told.run(pairs(20), should_stop=lambda: True).status is TrainStatus.PAUSED
    assert told.run(pairs(20)).status is TrainStatus.SUCCEEDED


@pytest.mark.slow
def test_a_paused_child_loses_no_step(tmp_path: Path) -> None:
    """A real child process with a real model: it hears SIGTERM, keeps its step, and ends where an unbroken one ends."""
    base = write_model(tmp_path / "base", tokenizer=byte_tokenizer(), gain=3.0)
    config = parse_config(
        {
            "policy": {"method": "full", "device": "cpu"},
            "train": {"objective": "sft", "learning_rate": 1e-3, "batch_size": 4, "epochs": 40, "checkpoint_every": 1000},
        }
    )
    halted, straight = Told(tmp_path / "halted", config), Told(tmp_path / "straight", config)
    rows, start = demonstrations(20), Start(str(base))
    paused = halted.run(rows, start=start, should_stop=lambda: bool(halted.rows))
    assert paused.status is TrainStatus.PAUSED
    found = last_checkpoint(halted.folder / "checkpoints")
    assert found is not None
    assert found[0] == paused.steps > 0
    result = halted.run(rows, start=start)
    assert (result.resumed_from, result.steps) == (paused.steps, 200)
    assert straight.run(rows, start=start).trained_tokens == result.trained_tokens
    weights = [(one.folder / "out" / "model.safetensors").read_bytes() for one in (halted, straight)]
    assert weights[0] == weights[1]
    assert len({step for step, _, _ in halted.checkpoints}) == 40


# --- the loop's own rows


@pytest.mark.parametrize(("objective", "kinds"), [("sft", {1}), ("grpo", {2, 3}), ("dpo", {2})])
def test_the_loop_trains_on_the_rows_of_its_objective(tmp_path: Path, objective: str, kinds: set[int]) -> None:
    """Feedback in the store, a dataset with its lineage, a version: the same for every kind of row."""
    settings = {"objective": objective, "min_pairs": 4}
    config = parse_config({"state_dir": tmp_path, "policy": {"name": "support-bot", "model": "fake"}, "train": settings})
    with open_store(tmp_path / "artifacts") as store:
        base = Version("support-bot", 0, VersionKind.BASE, "fake", "", None, None, None, NOW)
        store.write(lambda c: versions.insert(c, base))
        for n in range(4):
            put(store, said("answer 91", "answer 11", "answer 51", prompt=f"scored {n}", rows=scores(1.0, 0.0, 0.5)))
            put(store, said("answer 92", "answer 12", prompt=f"picked {n}", rows=[pick(Label.A)]))
            ideal = row("demonstration", text="answer 99", choice_index=0)
            put(store, said("answer 13", prompt=f"shown {n}", rows=[ideal]))
        dataset = pairs_stage.run(store, FakeTokens(), config, cycle_id=None, parent=0)
        assert dataset is not None
        found = list(snapshot.read_rows(Path(dataset.path) / "train.jsonl"))
        assert {2 if isinstance(one, PreferencePair) else len(one.answers) for one in found} == kinds
        with store.reading() as c:
            assert datasets.lineage(c, found[0].row_id) == (sorted(found[0].group_ids), sorted(found[0].feedback_ids))
        record = run(store, config, dataset=dataset, parent=base, owner="me")
    assert record.version is not None
    assert record.result["pairs"] == len(found) == dataset.n_train


# --- what hyperparameters mean


def configured(**train: Any) -> Config:
    return parse_config({"train": train})


def test_auto_is_what_is_configured() -> None:
    config = configured(**RECIPE, learning_rate=2e-5, batch_size=8)
    section, resolved = train_settings("dpo", {"beta": "auto", "n_epochs": "auto"}, config, seed=7)
    assert resolved == {"batch_size": 8, "learning_rate_multiplier": 1.0, "n_epochs": 4, "beta": 0.3}
    assert section == config.train.model_copy(update={"seed": 7})


def test_what_is_given_counts() -> None:
    given = {"beta": 0.5, "batch_size": 2, "learning_rate_multiplier": 3, "n_epochs": 2, "label_smoothing": 0.1}
    section, resolved = train_settings("dpo", given, configured(learning_rate=1e-5))
    assert resolved == {**given, "learning_rate_multiplier": 3.0}
    assert (section.beta, section.batch_size, section.epochs, section.label_smoothing) == (0.5, 2, 2, 0.1)
    assert section.learning_rate == pytest.approx(3e-5)


@pytest.mark.parametrize(("method", "objective"), [("supervised", "sft"), ("sft", "sft"), ("grpo", "grpo"), ("kto", "kto")])
def test_methods_by_name(method: str, objective: str) -> None:
    """Options of the configured objective that this one does not read are left out."""
    section, resolved = train_settings(method, {}, configured(**RECIPE))
    assert section.objective == objective
    assert ("beta" in resolved) is (objective != "sft")
    assert section.epochs == 4


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("dpo", "beta", 0),
        ("dpo", "beta", 2.1),
        ("dpo", "beta", True),
        ("dpo", "beta", "high"),
        ("dpo", "beta", float("nan")),
        ("dpo", "batch_size", 0),
        ("dpo", "batch_size", 257),
        ("dpo", "batch_size", 1.5),
        ("supervised", "n_epochs", 51),
        ("supervised", "n_epochs", "3"),
        ("supervised", "learning_rate_multiplier", -1),
        ("supervised", "learning_rate_multiplier", float("inf")),
        ("supervised", "beta", 0.1),
        ("dpo", "kl_weight", 0.1),
        ("dpo", "label_smoothing", 0.9),
        ("grpo", "advantage_std", "none at all"),
        ("grpo", "reasoning_effort", "high"),
    ],
)
def test_a_bad_hyperparameter_is_named(method: str, key: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=key) as caught:
        train_settings(method, {key: value}, Config())
    assert caught.value.param == f"method.{method}.hyperparameters.{key}"


def test_a_bad_hyperparameter_of_a_job_without_method_is_named_where_it_stands() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        train_settings("supervised", {"n_epochs": 0}, Config(), param="hyperparameters")
    assert caught.value.param == "hyperparameters.n_epochs"


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="unknown method 'ppo'; known are supervised, dpo") as caught:
        train_settings("ppo", {}, Config())
    assert caught.value.param == "method.type"
    with pytest.raises(ConfigError, match="there is no 'ppo'"):
        with_objective(TrainSection(), "ppo")


@given(
    beta=st.floats(min_value=0, max_value=2, exclude_min=True),
    batch_size=st.integers(1, 256),
    n_epochs=st.integers(1, 50),
    multiplier=st.floats(min_value=1e-6, max_value=1e6),
)
def test_everything_in_bounds_is_taken_as_it_is(beta: float, batch_size: int, n_epochs: int, multiplier: float) -> None:
    given_ = {"beta": beta, "batch_size": batch_size, "n_epochs": n_epochs, "learning_rate_multiplier": multiplier}
    section, resolved = train_settings("dpo", given_, Config())
    assert resolved == given_
    assert (section.beta, section.batch_size, section.epochs) == (beta, batch_size, n_epochs)
