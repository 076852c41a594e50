"""Trackers: what they have heard is read back with their own readers, and a tracker that fails stops nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests import waiting
from tests.loop_rig import open_rig, settings
from tests.test_jobs import a_job, until, working

from pairloop.cli import pairloop
from pairloop.config import Config, load_config, parse_config
from pairloop.errors import ConfigError
from pairloop.loop import cycle
from pairloop.store import runs, verdicts
from pairloop.track import RunInfo, courier, reporting, training_info
from pairloop.track.courier import Courier
from pairloop.types import CycleState

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:Warning")  # MLflow's, about SQLAlchemy 2.1
ROWS: list[dict[str, Any]] = [
    {"step": 1, "of": 3, "loss": 0.7, "warning": "words are no figure"},
    {"step": 2, "of": 3, "loss": 0.6},
    {"step": 2, "of": 3, "heldout": {"loss": 0.65}},
    {"step": 3, "of": 3, "loss": None, "ess": 0.9},
]


@pytest.fixture(autouse=True)
def _nothing_leaves_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(courier, "CLOSE_S", 120.0)  # what is read back has to be there, on a busy machine too


def tracked(tmp_path: Path, *names: str, **track: Any) -> Config:
    return settings(tmp_path, track={"to": names, **track})


def info(config: Config, key: str = "cycle_1", **facts: Any) -> RunInfo:
    return training_info(config, key=key, name="bot cycle 1", **facts)


def tell(config: Config, rows: list[dict[str, Any]]) -> None:
    with reporting(config, info(config, dataset="dataset_1", pairs=9)) as report:
        for row in rows:
            report.row(row)


class Mlflow:
    """The one run of an MLflow database."""

    def __init__(self, config: Config) -> None:
        self._client = MlflowClient(f"sqlite:///{config.state_dir / 'mlflow.sqlite'}")
        experiment = self._client.get_experiment_by_name("bot")
        assert experiment is not None
        (self.run,) = self._client.search_runs([experiment.experiment_id])

    def history(self, name: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in self._client.get_metric_history(self.run.info.run_id, name)]


def board(config: Config, key: str = "cycle_1") -> Any:
    found = EventAccumulator(str(config.state_dir / "tracking" / "tensorboard" / "bot" / key), {"tensors": 0})
    found.Reload()
    return found


def curve(found: Any, name: str) -> list[tuple[int, Any]]:
    return [(event.step, pytest.approx(event.tensor_proto.float_val[0], rel=1e-6)) for event in found.Tensors(name)]


def words(found: Any, name: str) -> str:
    (event,) = found.Tensors(name)
    text: bytes = event.tensor_proto.string_val[0]
    return text.decode()


# --- what is heard


@pytest.mark.slow
def test_a_run_is_heard_once_whoever_takes_it_up_again(tmp_path: Path) -> None:
    config = tracked(tmp_path, "mlflow", "tensorboard")
    tell(config, ROWS[:1])
    tell(config, ROWS)
    tell(config, ROWS)
    run, events = Mlflow(config), board(config)
    assert run.history("train/loss") == [(1, 0.7), (2, 0.6)]
    assert run.history("heldout/loss") == [(2, 0.65)]
    assert run.history("train/ess") == [(3, 0.9)]
    assert curve(events, "train/loss") == [(1, 0.7), (2, 0.6)]
    assert curve(events, "heldout/loss") == [(2, 0.65)]
    params = run.run.data.params
    assert (params["dataset"], params["pairs"], params["train.beta"], params["policy.method"]) == (
        "dataset_1",
        "9",
        "0.1",
        "lora",
    )
    assert "| dataset | dataset_1 |" in words(events, "settings")
    assert {name for name in run.run.data.metrics if "of" in name.split("/") or "warning" in name} == set()


@pytest.mark.slow
def test_a_cycle_is_one_run_with_its_training_report_and_verdict(tmp_path: Path) -> None:
    config = tracked(tmp_path, "mlflow", "tensorboard")
    with open_rig(config) as rig:
        rig.serve(60)
        done = cycle.run(rig.loop, trigger="test")
        while done.state is CycleState.DUELLING:
            rig.judge(40)
            done = cycle.run(rig.loop, trigger="test")
        with rig.store.reading() as c:
            trained = runs.for_cycle(c, done.cycle_id)
            _, verdict = verdicts.for_cycle(c, done.cycle_id)[-1]
    assert (done.state, done.number) == (CycleState.PROMOTED, 1)
    assert trained is not None
    run, events = Mlflow(config).run, board(config, done.cycle_id)
    assert len(Mlflow(config).history("train/loss")) == trained.result["steps"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["pairloop.version"] == "bot@1"
    assert run.data.tags["pairloop.cycle_state"] == "promoted"
    assert run.data.params["dataset"] == trained.dataset_id
    assert run.data.metrics["gate/win_rate"] == verdict.wins / (verdict.wins + verdict.losses) > 0.5
    assert run.data.metrics["gate/e_value"] == verdict.e_value
    assert run.data.metrics["result/steps"] == trained.result["steps"]
    report = (done.record(CycleState.DUELLING) or {})["report"]["metrics"]["length_ratio"]
    assert run.data.metrics["evaluate/length_ratio"] == report["mean"]
    assert run.data.metrics["evaluate/length_ratio_hi"] == report["hi"]
    assert curve(events, "evaluate/length_ratio") == [(1, report["mean"])]
    assert words(events, "version") == "bot@1"


@pytest.mark.slow
def test_weights_and_biases_hears_the_same(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason='needs the extra "wandb"')
    config = tracked(tmp_path, "wandb")
    with reporting(config, info(config, dataset="dataset_1")) as report:
        for row in ROWS:
            report.row(row)
        report.trained({"steps": 3, "heldout_after": {"loss": 0.6}}, status="succeeded", version="bot@1", number=4)
    (path,) = (tmp_path / "tracking").glob("wandb/offline-run-*/run-cycle_1.wandb")
    records = finished_wandb_records(path)
    steps = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.history.item
    ]
    assert [(step["_step"], step.get("train/loss")) for step in steps] == [(1, 0.7), (2, 0.6), (3, None)]
    assert steps[1]["heldout/loss"] == 0.65
    summary = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for r in records for item in r.summary.update}
    assert (summary["version"], summary["cycle"], summary["heldout_after/loss"]) == ("bot@1", 4, 0.6)


def finished_wandb_records(path: Path) -> list[Any]:
    """All records, once its own process has written the last one."""

    def whole() -> list[Any]:
        records = list(wandb_records(path))
        return records if any(record.HasField("exit") for record in records) else []

    return waiting.until(whole, patience_s=60, why=lambda: "Weights & Biases did not finish the run's file")


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a run that was kept on disk: LevelDB's log format behind a header of seven bytes."""
    proto: Any = import_module("wandb.proto.wandb_internal_pb2")
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield proto.Record.FromString(parts)
            parts = b""


def test_training_on_a_file_is_heard_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{n}?", "chosen": "{n}8", "rejected": "{n}1"}}\n' for n in range(40)))
    monkeypatch.setenv("PAIRLOOP_TRACK_TO", '["tensorboard"]')
    monkeypatch.setenv("PAIRLOOP_TRACK_FOLDER", str(tmp_path / "board"))
    done = CliRunner().invoke(
        pairloop, ["train", "--data", str(rows), "--model", "fake", "--out", str(tmp_path / "out"), "--json"]
    )
    assert done.exit_code == 0, done.output
    (folder,) = (tmp_path / "board" / "tensorboard" / "support-bot").iterdir()
    events = EventAccumulator(str(folder), {"tensors": 0})
    events.Reload()
    steps = json.loads(done.stdout)["result"]["steps"]
    assert [step for step, _ in curve(events, "train/loss")] == list(range(1, steps + 1))
    assert words(events, "status") == "succeeded"
    assert f"| data_sha256 | {hashlib.sha256(rows.read_bytes()).hexdigest()} |" in words(events, "settings")


def test_a_fine_tuning_job_is_heard_too(tmp_path: Path) -> None:
    config = tracked(tmp_path, "tensorboard")
    with open_rig(config) as rig:
        job = a_job(rig.store, config, n_epochs=2, beta=0.7)
        with working(rig):
            done = until(rig.store, job, lambda now: now.status.is_terminal)
    events = board(config, job.job_id)
    assert done.fine_tuned_model is not None
    assert words(events, "version") == done.fine_tuned_model
    steps = [step for step, _ in curve(events, "train/loss")]
    assert steps == list(range(1, len(steps) + 1)) != []
    assert "| train.beta | 0.7 |" in words(events, "settings")
    assert f"| dataset | {done.dataset_id} |" in words(events, "settings")


# --- what goes wrong


def test_a_tracker_that_fails_is_said_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nowhere = "sqlite:////proc/nowhere/mlflow.db"
    with open_rig(tracked(tmp_path, "mlflow", "tensorboard", mlflow_uri=nowhere)) as rig:
        rig.serve(60)
        with caplog.at_level(logging.WARNING, logger="pairloop.track"):
            done = cycle.run(rig.loop, trigger="test")
        assert done.state is CycleState.DUELLING
        said = [record.getMessage() for record in caplog.records if record.name.startswith("pairloop.track")]
        assert len(said) == 2  # once for the training, once for the report of its cycle
        assert all("mlflow hears no more of bot cycle 1" in text and "/proc/nowhere" in text for text in said)
        assert curve(board(rig.loop.config, done.cycle_id), "train/loss")


class Stuck:
    """A tracker whose server never answers."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def open(self, _: RunInfo) -> int:
        return 0

    def step(self, *_: object) -> None:
        self.let_go.wait(60)

    figures = notes = close = step


def test_a_tracker_that_hangs_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stuck = Stuck()
    thread = Courier("stuck", lambda: stuck, info(settings(tmp_path)))
    thread.start()
    for step in range(1, 1000):
        thread.row({"step": step, "of": 1000, "loss": 0.5})
    thread.end("finished")
    thread.wait(0.05)
    assert "stuck did not take all of bot cycle 1" in caplog.text
    assert thread.daemon
    stuck.let_go.set()
    thread.join(20)
    assert not thread.is_alive()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python marks a module that cannot be imported
    with pytest.raises(ConfigError, match=r'wandb is not installed: pip install "pairloop\[wandb\]"'):
        parse_config({"track": {"to": ["mlflow", "wandb"]}})


@pytest.mark.parametrize(
    ("track", "reason"),
    [
        ({"to": ["comet"]}, "'mlflow', 'wandb' or 'tensorboard'"),
        ({"to": ["mlflow", "mlflow"]}, "names a tracker twice"),
        ({"mlflow_uri": "http://mlflow"}, "is read by mlflow alone"),
    ],
)
def test_settings_that_do_nothing_are_refused(track: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_config({"track": track})


def test_trackers_are_named_by_the_environment_too() -> None:
    assert load_config(env={"PAIRLOOP_TRACK_TO": '["mlflow"]', "PAIRLOOP_TRACK_PROJECT": "bots"}).track.project == "bots"
