"""The steps of one round up to where its controller stops it: the one loop of the product and of the lab."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pairloop.config import TrainSection
from pairloop.learner import checkpoint
from pairloop.learner.checkpoint import Weights
from pairloop.learner.controller import RoundController, Stop
from pairloop.learner.data import TokenGroup
from pairloop.learner.step import learning_rate

Row = Mapping[str, Any]


@dataclass(slots=True)
class Passes:
    """One round's batches, step by step.

    step: trains on a batch at a learning rate, and gives its metrics. look: the metrics of the held-out pairs as the policy
    stands; None where there are none. best: the weights of the lowest held-out loss so far. stop: why the round ended, None
    while it runs.
    """

    model: nn.Module
    settings: TrainSection
    controller: RoundController
    step: Callable[[Sequence[TokenGroup], float], dict[str, float]]
    look: Callable[[], dict[str, float]] | None = None
    best: Weights | None = None
    stop: Stop | None = None

    def run(self, batches: Sequence[Sequence[TokenGroup]], done: int = 0) -> Iterator[list[Row]]:
        """Of each step after the first ``done``: its metrics row, and the row of the look that was due after it.

        When it is exhausted, ``stop`` is set and the model has the weights that are to be taken.
        """
        of = len(batches)
        # The first look is at the parent: it is what the first rise is a rise from.
        if done == 0 and self.look is not None and self.controller.is_due:
            self.controller.after_heldout(self.look())
        while self.stop is None:
            row: dict[str, Any] = {"step": done + 1, "of": of}
            row |= self.step(batches[done], learning_rate(done + 1, of, self.settings))
            done += 1
            rows: list[Row] = [row]
            self.stop = self.controller.after_step(row)
            if self.stop is None and self.look is not None and self.controller.is_due:
                found = self.look()
                rows.append({"step": done, "of": of, "heldout": found})
                self.stop = self.controller.after_heldout(found)
                if self.controller.keeps_best:
                    self.best = checkpoint.kept(self.model)
            if self.stop is not None and self.stop.best_step is not None and self.best is not None:
                checkpoint.put_back(self.model, self.best)
            yield rows
