"""TensorBoard: event files, one folder per run; `tensorboard --logdir` shows them."""

from __future__ import annotations

import time
from collections.abc import Mapping

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from pairloop.config import Config
from pairloop.track.files import tracking_folder
from pairloop.track.run import Outcome, RunInfo


class TensorBoardTracker:
    """By TensorBoard's own writer, which needs neither TensorFlow nor torch."""

    def __init__(self, config: Config) -> None:
        self._root = tracking_folder(config) / "tensorboard"
        self._writer: EventFileWriter | None = None

    def open(self, run: RunInfo) -> int:
        folder = self._root / run.project / run.key
        earlier = sorted(folder.glob("events.out.tfevents.*"))
        last = max(
            (event.step for path in earlier for event in EventFileLoader(str(path)).Load() if _is_of_training(event)), default=0
        )
        self._writer = EventFileWriter(str(folder))
        if not earlier:
            rows = "\n".join(f"| {name} | {value} |" for name, value in run.settings.items())
            self._write(text_pb("settings", f"{run.name}\n\n| setting | value |\n|---|---|\n{rows}"), 0)
        return last

    def step(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(scalar_pb(name, value), step)

    def figures(self, number: int, values: Mapping[str, float]) -> None:
        self.step(number, values)

    def notes(self, values: Mapping[str, str]) -> None:
        for name, value in values.items():
            self._write(text_pb(name, value), 0)

    def close(self, outcome: Outcome) -> None:
        if outcome == "failed":
            self.notes({"outcome": outcome})
        assert self._writer is not None, "opened before it is closed"
        self._writer.close()

    def _write(self, summary: Summary, step: int) -> None:
        assert self._writer is not None, "opened before anything is told"
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def _is_of_training(event: Event) -> bool:
    return any(value.tag.startswith("train/") for value in event.summary.value)
