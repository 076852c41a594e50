"""MLflow: a server or a database. Its user, password or token come from the MLFLOW_TRACKING_… environment variables."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from mlflow import is_tracking_uri_set
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from pairloop.config import Config
from pairloop.track.run import Outcome, RunInfo

KEY_TAG = "pairloop.key"
_STATUS = {"finished": "FINISHED", "failed": "FAILED"}
_PARAMS_AT_ONCE = 100
_LONGEST_PARAM = 500


class MlflowTracker:
    """Through MLflow's client alone, so that nothing global is set for other users of MLflow in the process."""

    def __init__(self, config: Config) -> None:
        is_set: Any = is_tracking_uri_set
        uri = config.track.mlflow_uri
        if uri is None and not is_set():
            uri = f"sqlite:///{config.state_dir.resolve() / 'mlflow.sqlite'}"
        self._client = MlflowClient(tracking_uri=uri)
        self._run_id = ""

    def open(self, run: RunInfo) -> int:
        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        found = self._client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{run.key}'", max_results=1)
        if found:
            self._run_id = found[0].info.run_id
            names = [name for name in found[0].data.metrics if name.startswith("train/")]
            metrics = (metric for name in names for metric in self._client.get_metric_history(self._run_id, name))
            return max((metric.step for metric in metrics), default=0)
        created = self._client.create_run(experiment_id, tags={KEY_TAG: run.key}, run_name=run.name)
        self._run_id = created.info.run_id
        params = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in run.settings.items()]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=params[start : start + _PARAMS_AT_ONCE])
        return 0

    def step(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = time.time_ns() // 1_000_000
        self._client.log_batch(self._run_id, metrics=[Metric(name, value, now_ms, step) for name, value in values.items()])

    def figures(self, number: int, values: Mapping[str, float]) -> None:
        self.step(number, values)

    def notes(self, values: Mapping[str, str]) -> None:
        for name, value in values.items():
            self._client.set_tag(self._run_id, f"pairloop.{name}", value)

    def close(self, outcome: Outcome) -> None:
        if outcome in _STATUS:
            self._client.set_terminated(self._run_id, _STATUS[outcome])
