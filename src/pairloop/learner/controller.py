"""The round controller: says when a round has used up its data, and why. Pure Python, blind to who drives it.

A round learns from completions that an earlier policy sampled. The further it moves from that policy, the less they say about
it, so the round stops at the first of: all passes done, effective sample size below ``stop_ess``, held-out loss rising, d+
falling, length or entropy out of bounds. The keys of ``TrainSection`` set each bound; 0 switches a rule off.

The figures of single batches scatter, so the mean of the last ``WINDOW`` steps is what a bound is compared with. Length and
entropy are estimated with importance weights, and scatter the more the lower a batch's effective sample size was: its steps
count by that, about as the inverse of their variance, and below ``LEAST_ESS`` they decide nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from pairloop.config import TrainSection

LOG = logging.getLogger(__name__)

WINDOW = 8
"""Steps whose mean decides: one batch alone is too noisy."""
LEAST_ESS = 0.25
"""Mean effective sample size below which a single completion may stand for half the batch, and its length for all."""
HELDOUT_NEEDED = 32
"""Held-out pairs below which a look decides nothing: their loss moves with the batch's luck."""
COMPLETED = "completed"
ESTIMATES = ("ess", "length_ratio", "entropy_ratio")

Row = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a round ends.

    ``reason``: ``completed``, ``ess``, ``length_ratio``, ``entropy_ratio``, ``heldout_loss`` or ``d_chosen``. ``message``: the
    figures and what they mean. ``best_step``: the step whose weights to take instead of the last ones, or None.
    """

    reason: str
    message: str
    best_step: int | None = None


@dataclass(slots=True)
class ControllerState:
    """What a resumed round needs to go on as an unbroken one; plain JSON."""

    step: int = 0
    window: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    heldout_loss: float | None = None
    d_chosen: float | None = None
    loss_rises: int = 0
    d_chosen_falls: int = 0
    best_step: int = 0
    best_loss: float | None = None


class RoundController:
    """Told of each step and each held-out look, it says when to stop."""

    def __init__(self, settings: TrainSection, state: Mapping[str, Any] | None = None) -> None:
        self._settings = settings
        self._state = ControllerState(**(state or {}))

    @property
    def state(self) -> dict[str, Any]:
        """Plain JSON data; ``RoundController(settings, state)`` goes on from it."""
        return asdict(self._state)

    @property
    def warnings(self) -> list[str]:
        """What was remarkable, but no reason to stop; each once."""
        return list(self._state.warnings)

    @property
    def is_due(self) -> bool:
        """True where the held-out pairs are to be looked at now: before the first step, and after every ``heldout_every``."""
        every = self._settings.heldout_every
        return every > 0 and self._state.step % every == 0

    @property
    def keeps_best(self) -> bool:
        """True right after the look with the lowest held-out loss so far, where a later stop would take its weights."""
        return bool(self._settings.stop_heldout_rises) and 0 < self._state.best_step == self._state.step

    def after_step(self, row: Row) -> Stop | None:
        """``row``: the step's metrics, and ``step`` and ``of`` where the passes have an end. What is not finite is skipped."""
        state = self._state
        state.step = int(row.get("step", state.step + 1))
        found = {name: row.get(name, math.nan) for name in ESTIMATES}
        if math.isfinite(found["ess"]):
            state.window.append({name: value for name, value in found.items() if math.isfinite(value)})
            del state.window[:-WINDOW]
        stop = self._on_ess() or self._on_length() or self._on_entropy() if state.window else None
        if stop is None and state.step >= row.get("of", math.inf):
            return Stop(COMPLETED, f"all passes done, {state.step} steps")
        return stop

    def after_heldout(self, metrics: Row) -> Stop | None:
        """``metrics`` of the held-out rows as the policy stands, see `pairloop.learner.measure.measure`.

        The pair loss and not the objective's: a likelihood term rises with what is memorised while margins still generalise.
        """
        state = self._state
        if metrics["n"] < HELDOUT_NEEDED:
            few = f"{metrics['n']:.0f} held-out rows are too few to stop on, it takes {HELDOUT_NEEDED}"
            self._warn(few)
            return None
        # Where not all rows compare answers (demonstrations do not), the objective's own loss speaks for all of them.
        is_of_pairs = metrics.get("compared", metrics["n"]) == metrics["n"]
        loss, d_chosen = metrics["pair_loss" if is_of_pairs else "loss"], metrics["d_chosen_per_token"]
        before, d_before = state.heldout_loss, state.d_chosen
        state.loss_rises = state.loss_rises + 1 if before is not None and loss > before else 0
        state.d_chosen_falls = state.d_chosen_falls + 1 if d_before is not None and d_chosen < d_before else 0
        state.heldout_loss, state.d_chosen = loss, d_chosen
        if state.step > 0 and (state.best_loss is None or loss < state.best_loss):
            state.best_loss, state.best_step = loss, state.step
        return self._on_heldout(loss) or self._on_d_chosen(d_chosen)

    @property
    def _ess(self) -> float:
        return fmean(step["ess"] for step in self._state.window)

    def _mean(self, name: str) -> float | None:
        """The estimate's mean over the window, each step counting by its effective sample size; None where that is too low."""
        steps = [step for step in self._state.window if name in step]
        if not steps or self._ess < LEAST_ESS:
            return None
        return fmean([step[name] for step in steps], [step["ess"] for step in steps])

    def _warn(self, text: str) -> None:
        if text not in self._state.warnings:
            self._state.warnings.append(text)
            LOG.warning(text)

    def _when(self) -> str:
        return f"(mean of {len(self._state.window)} steps, up to step {self._state.step})"

    def _on_ess(self) -> Stop | None:
        mean, settings = self._ess, self._settings
        said = f"the effective sample size is {mean:.2f} {self._when()}"
        if mean < settings.stop_ess:
            return Stop(
                "ess",
                f"{said}, below train.stop_ess = {settings.stop_ess:g}: the policy has moved too far from what sampled the "
                "pairs for them to say where to go next. What it learned is kept; fresh pairs take it further",
            )
        warned = any(text.startswith("the effective sample size") for text in self._state.warnings)
        if mean < settings.warn_ess and not warned:
            self._warn(
                f"{said}, below train.warn_ess = {settings.warn_ess:g}: from here on the gradient of old pairs is no longer "
                "that of reinforcement learning; shorter rounds stay closer to it"
            )
        return None

    def _on_length(self) -> Stop | None:
        mean = self._mean("length_ratio")
        low, high = self._settings.min_length_ratio, self._settings.max_length_ratio
        if mean is None or (mean >= low and (mean <= high or not high)):
            return None
        return Stop(
            "length_ratio",
            f"answers are {mean:.2f} times as long as the sampler's {self._when()}, outside "
            f"train.min_length_ratio = {low:g} and train.max_length_ratio = {high:g}: the round has begun to learn length",
        )

    def _on_entropy(self) -> Stop | None:
        mean, low = self._mean("entropy_ratio"), self._settings.min_entropy_ratio
        if mean is None or mean >= low:
            return None
        return Stop(
            "entropy_ratio",
            f"the entropy of an answer is {mean:.2f} times the sampler's {self._when()}, below "
            f"train.min_entropy_ratio = {low:g}: the policy is about to say the same thing always",
        )

    def _on_heldout(self, loss: float) -> Stop | None:
        state, needed = self._state, self._settings.stop_heldout_rises
        if not needed or state.loss_rises < needed:
            return None
        return Stop(
            "heldout_loss",
            f"the loss on held-out rows rose {state.loss_rises} looks in a row, to {loss:.4f} at step {state.step}: the "
            f"round fits its own pairs only. The weights of step {state.best_step} are taken, where it was lowest, at "
            f"{state.best_loss:.4f}",
            best_step=state.best_step,
        )

    def _on_d_chosen(self, d_chosen: float) -> Stop | None:
        state, needed, loss = self._state, self._settings.stop_d_chosen_falls, self._settings.max_d_chosen_loss
        if not needed or state.d_chosen_falls < needed or d_chosen >= -loss:
            return None
        return Stop(
            "d_chosen",
            f"held-out chosen answers became less likely {state.d_chosen_falls} looks in a row, to d+ = {d_chosen:.2f} nats "
            f"per token at step {state.step}, beyond train.max_d_chosen_loss = {loss:g}: the round takes "
            "likelihood from both sides; train.nll_weight holds the chosen ones up",
        )
