"""Carries reports to the trackers, each in a thread of its own: training neither waits for one nor fails with it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from pairloop.config import Config
from pairloop.track.run import Outcome, RunInfo, Tracker, numbers

LOG = logging.getLogger(__name__)

CLOSE_S = 10.0
"""How long the end of a run waits for trackers that have not taken everything yet."""

Task = Callable[[Tracker], None]


class Courier(threading.Thread):
    """One tracker's thread for one run. A daemon: a server that does not answer never holds up the end of the process."""

    def __init__(self, name: str, make: Callable[[], Tracker], run: RunInfo) -> None:
        super().__init__(name=f"track-{name}", daemon=True)
        self._tracker_name, self._make, self._run_info = name, make, run
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._outcome: Outcome = "finished"
        self._at = (0, False)

    def send(self, task: Task) -> None:
        self._tasks.put(task)

    def row(self, row: Mapping[str, Any]) -> None:
        """A metrics row, unless the tracker has had it: of a run that was taken up again all rows come again."""
        at = (int(row["step"]), "heldout" in row)

        def tell(tracker: Tracker) -> None:
            if at > self._at:
                self._at = at
                heldout = row.get("heldout")
                tracker.step(at[0], numbers("heldout", heldout) if heldout is not None else _step_values(row))

        self.send(tell)

    def end(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._tasks.put(None)

    def wait(self, timeout_s: float) -> None:
        self.join(timeout_s)
        if self.is_alive():
            LOG.warning("%s did not take all of %s in %.0f s", self._tracker_name, self._run_info.name, timeout_s)

    def run(self) -> None:
        try:
            tracker = self._make()
            self._at = (tracker.open(self._run_info), True)
            while (task := self._tasks.get()) is not None:
                task(tracker)
            tracker.close(self._outcome)
        except Exception as error:  # noqa: BLE001 - whatever a tracker's library raises, the training goes on
            LOG.warning("%s hears no more of %s: %s", self._tracker_name, self._run_info.name, error or type(error).__name__)


class Report:
    """What the owner of a run tells about it; nothing here waits or raises."""

    def __init__(self, couriers: list[Courier]) -> None:
        self._couriers = couriers
        self.outcome: Outcome = "finished"

    def row(self, row: Mapping[str, Any]) -> None:
        """A metrics row of the training, as `on_progress` gets it."""
        for courier in self._couriers:
            courier.row(row)

    def figures(self, values: Mapping[str, float], *, number: int = 0) -> None:
        for courier in self._couriers:
            courier.send(lambda tracker: tracker.figures(number, values))

    def notes(self, values: Mapping[str, str]) -> None:
        for courier in self._couriers:
            courier.send(lambda tracker: tracker.notes(values))

    def trained(self, result: Mapping[str, Any], *, status: str, version: str | None = None, number: int = 0) -> None:
        """How a training run ended; ``running`` and ``paused``: it was stopped, and will go on."""
        if status in ("running", "paused"):
            self.outcome = "stopped"
            return
        self.outcome = "finished" if status in ("succeeded", "nothing_to_train") else "failed"
        self.figures(numbers("result", result) | numbers("heldout_after", result.get("heldout_after") or {}), number=number)
        error = result.get("error") or {}
        said = {
            "status": status,
            "version": version,
            "stopped_because": result.get("stopped_because"),
            "error": error.get("code"),
        }
        self.notes({name: str(value) for name, value in said.items() if value})


@contextmanager
def reporting(config: Config, run: RunInfo) -> Iterator[Report]:
    """A report to each configured tracker; at the end they have ``CLOSE_S`` to take what is left of it."""
    couriers = [Courier(name, _maker(name, config), run) for name in config.track.to]
    report = Report(couriers)
    for courier in couriers:
        courier.start()
    try:
        yield report
    except BaseException:
        report.outcome = "failed"
        raise
    finally:
        for courier in couriers:
            courier.end(report.outcome)
        for courier in couriers:
            courier.wait(CLOSE_S)


def _maker(name: str, config: Config) -> Callable[[], Tracker]:
    """Imports the tracker, whose library may take seconds, in the thread that needs it."""

    def make() -> Tracker:
        if name == "mlflow":
            from pairloop.track.mlflow import MlflowTracker

            return MlflowTracker(config)
        if name == "wandb":
            from pairloop.track.wandb import WandbTracker

            return WandbTracker(config)
        from pairloop.track.tensorboard import TensorBoardTracker

        return TensorBoardTracker(config)

    return make


def _step_values(row: Mapping[str, Any]) -> dict[str, float]:
    return numbers("train", {name: value for name, value in row.items() if name not in ("step", "of")})
