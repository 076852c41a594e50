"""The derivation's Taylor steps one by one: how large is what each of them drops, as the policy leaves the reference?

From DPO's loss and from GRPO's to one common linear form, on a real model moved along DPO's own first step. A step holds where
its dropped term stays within the bound of the first omitted order at every drift, and shrinks with the power of the drift that
the derivation needs: then its gradient vanishes at the reference. Two steps drop nothing at all there, and one cannot be made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pairloop.lab.probes import Probe, Sampled, gradient, pair_batch, trainable
from pairloop.objective import OBJECTIVES, Batch, Objective, ObjectiveSettings

Row = dict[str, Any]

BETA, KL_WEIGHT = 0.1, 0.04
DRIFTS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Aimed-at root mean square of h, nats; what was reached is measured."""

ORDER_TOLERANCE = 0.35
"""The orders are asymptotic, and pairs differ in how far they move."""

_NOISE = 1e-13
"""Below this a dropped loss is rounding, and has no order."""

_SAME_GRADIENT = 1e-12
_STAYS = 0.01
"""Least share of the gradient that a dropped term without order must make up, at every drift."""

_PROBE_STEP = 1e-4
_SETTINGS = ObjectiveSettings(beta=BETA, kl_weight=KL_WEIGHT, loss_mean="sum")
_NO_KL = replace(_SETTINGS, kl_weight=0.0)
_BARE = replace(_NO_KL, clip_low=math.inf, clip_high=math.inf)
_SEQUENCE = replace(_BARE, loss_mean="sequence")


@dataclass(frozen=True, slots=True)
class View:
    """A batch of pairs at one drift, first completion chosen; delta: token log-ratios, 0 outside completions; x = beta h."""

    batch: Batch
    objectives: Mapping[str, Objective]

    @property
    def delta_BGT(self) -> Tensor:
        return torch.where(self.batch.mask_BGT, self.batch.logp_BGT - self.batch.ref_logp_BGT, 0.0)

    @property
    def h_B(self) -> Tensor:
        d_BG = self.delta_BGT.sum(-1)
        return d_BG[:, 0] - d_BG[:, 1]

    @property
    def x_B(self) -> Tensor:
        return BETA * self.h_B

    def loss(self, name: str, settings: ObjectiveSettings) -> Tensor:
        return self.objectives[name].loss(self.batch, settings)

    def over_pairs(self, value_BGT: Tensor) -> Tensor:
        """Summed over tokens, mean over all completions: what the group family's ``sum`` does."""
        return value_BGT.sum(-1).mean()


Part = Callable[[View], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what is dropped is ``full - kept``.

    order: the power of the drift with which the dropped loss shrinks (its gradient: one less); 0 where what is dropped does
    not shrink, None where nothing is dropped (or not until a token reaches the clip). bound: of the dropped loss, at any drift.
    """

    name: str
    dropped: str
    full: Part
    kept: Part
    order: int | None
    bound: Part | None


def _dpo_series(terms: int) -> Part:
    """log 2 - x/2 + x^2/8 - x^4/192, its first ``terms`` terms, mean over pairs."""

    def series(view: View) -> Tensor:
        x_B = view.x_B
        parts = [torch.full_like(x_B, math.log(2)), -x_B / 2, x_B**2 / 8, -(x_B**4) / 192]
        return torch.stack(parts[:terms]).sum(0).mean()

    return series


def _linear_grpo(view: View) -> Tensor:
    """-A (1 + delta) with A = +1 for the chosen and -1 for the rejected."""
    one_plus_BGT = torch.where(view.batch.mask_BGT, 1 + view.delta_BGT, 0.0)
    return view.over_pairs(torch.stack([-one_plus_BGT[:, 0], one_plus_BGT[:, 1]], 1))


def _second_order(view: View) -> Tensor:
    """e^u - 1 - u <= e^|u| u^2 / 2 for every token."""
    delta_BGT = view.delta_BGT
    return view.over_pairs(delta_BGT.abs().exp() * delta_BGT**2 / 2)


def _nothing(view: View) -> Tensor:
    """What rounding may leave."""
    return view.h_B.new_tensor(_NOISE)


def _beyond_clip(view: View) -> Tensor:
    """|w - clip(w)| of every token: 0 until a token's ratio leaves [1 - low, 1 + high]."""
    ratio_BGT = view.delta_BGT.exp()
    return view.over_pairs((ratio_BGT - ratio_BGT.clamp(1 - _NO_KL.clip_low, 1 + _NO_KL.clip_high)).abs())


def _scaled_linear_grpo(view: View) -> Tensor:
    """The linear GRPO loss on DPO's scale; 1's own part is the difference of the lengths, which has no gradient."""
    lengths_BG = view.batch.mask_BGT.sum(-1)
    return math.log(2) + BETA * (_linear_grpo(view) + (lengths_BG[:, 0] - lengths_BG[:, 1]).double().mean() / 2)


STEPS: tuple[Step, ...] = (
    Step(
        "DPO: -log sigmoid(beta h) = log 2 - (beta/2) h",
        "(beta^2/8) h^2 and beyond",
        lambda v: v.loss("dpo", _BARE),
        _dpo_series(2),
        2,
        lambda v: (v.x_B**2 / 8).mean(),
    ),
    Step(
        "DPO: … + (beta^2/8) h^2",
        "(beta^4/192) h^4 and beyond",
        lambda v: v.loss("dpo", _BARE),
        _dpo_series(3),
        4,
        lambda v: (v.x_B**4 / 192).mean(),
    ),
    Step(
        "DPO: … - (beta^4/192) h^4",
        "(beta^6/2880) h^6 and beyond",
        lambda v: v.loss("dpo", _BARE),
        _dpo_series(4),
        6,
        lambda v: (v.x_B**6 / 2880).mean(),
    ),
    Step(
        "GRPO: without the k3 KL term",
        "kl_weight (e^-u - 1 + u), u the token's log-ratio",
        lambda v: v.loss("grpo", _SETTINGS),
        lambda v: v.loss("grpo", _NO_KL),
        2,
        lambda v: KL_WEIGHT * _second_order(v),
    ),
    Step(
        "GRPO: without clipping",
        "what lies beyond the clip",
        lambda v: v.loss("grpo", _NO_KL),
        lambda v: v.loss("grpo", _BARE),
        None,
        _beyond_clip,
    ),
    Step(
        "GRPO: ratio e^u = 1 + u",
        "A u^2/2 and beyond",
        lambda v: v.loss("grpo", _BARE),
        _linear_grpo,
        2,
        _second_order,
    ),
    Step(
        "the two linear forms are one: DPO's = beta x GRPO's",
        "nothing",
        _dpo_series(2),
        _scaled_linear_grpo,
        None,
        _nothing,
    ),
    Step(
        "GRPO: 1/|o| as one constant, 1/(mean length)",
        "no small term: lengths weigh the completions, at the reference too",
        lambda v: v.loss("grpo", _SEQUENCE),
        lambda v: v.loss("grpo", _BARE) / v.batch.length_BG.double().mean(),
        0,
        None,
    ),
)


def taylor_rows(probe: Probe, sampled: Sampled, *, objectives: Mapping[str, Objective] = OBJECTIVES) -> list[Row]:
    """One row per step: ``model, step, dropped, order, measured_order, holds`` and ``points``, one for each drift.

    sampled: pairs from the probe. A point has ``aim`` and ``h_rms`` (nats), ``loss_dropped``, its ``bound``, and
    ``gradient_dropped``, the norm of the dropped gradient over that of the step's full one.
    """
    views = list(_views(probe, sampled, objectives))
    return [_row(probe.name, step, [_point(step, *view) for view in views]) for step in STEPS]


def _views(
    probe: Probe, sampled: Sampled, objectives: Mapping[str, Objective]
) -> Iterator[tuple[float, View, list[nn.Parameter]]]:
    """The pairs under copies of the model, moved down DPO's gradient until the root mean square of h is about each drift."""
    batch = pair_batch(probe.model, sampled)
    parameters = trainable(probe.model)
    start = parameters_to_vector(parameters).detach()
    down = -gradient(objectives["dpo"].loss(batch, _BARE), parameters)
    down = down * (start.norm() / down.norm())

    def moved(size: float) -> tuple[View, list[nn.Parameter]]:
        model = deepcopy(probe.model)
        with torch.no_grad():
            vector_to_parameters(start + size * down, trainable(model))
        return View(pair_batch(model, sampled), objectives), trainable(model)

    rate = _rms(moved(_PROBE_STEP)[0].h_B) / _PROBE_STEP
    for drift in DRIFTS:
        yield drift, *moved(drift / rate)


def _point(step: Step, aim: float, view: View, parameters: Sequence[nn.Parameter]) -> Row:
    full, kept = step.full(view), step.kept(view)
    of_full, of_kept = gradient(full, parameters), gradient(kept, parameters)
    return {
        "aim": aim,
        "h_rms": _rms(view.h_B),
        "loss_dropped": abs(float((full - kept).detach())),
        "bound": None if step.bound is None else float(step.bound(view).detach()),
        "gradient_dropped": float((of_full - of_kept).norm() / of_full.norm()),
    }


def _row(model: str, step: Step, points: list[Row]) -> Row:
    row: Row = {"model": model, "step": step.name, "dropped": step.dropped, "order": step.order, "measured_order": None}
    if step.order:
        row["measured_order"] = {key: _slope(points, key) for key in ("loss_dropped", "gradient_dropped")}
    return row | {"points": points, "holds": _holds(step, points, row["measured_order"])}


def _slope(points: Sequence[Row], key: str) -> float | None:
    """Power of h with which ``key`` shrinks, between the two smallest drifts at which it is more than rounding; else None."""
    first, second, *_ = *(point for point in points if point[key] > _NOISE), None, None
    if first is None or second is None:
        return None
    return math.log(second[key] / first[key]) / math.log(second["h_rms"] / first["h_rms"])


def _holds(step: Step, points: Sequence[Row], measured: Row | None) -> bool:
    if step.order == 0:
        return all(point["gradient_dropped"] > _STAYS for point in points)
    if any(point["loss_dropped"] > point["bound"] * (1 + 1e-9) + _NOISE for point in points):
        return False
    if step.order is None or measured is None:
        # Where the bound says that nothing was dropped, neither may the gradient differ.
        return all(point["gradient_dropped"] < _SAME_GRADIENT for point in points if point["bound"] <= _NOISE)
    wanted = {"loss_dropped": step.order, "gradient_dropped": step.order - 1}
    found = {key: measured[key] for key in wanted}
    return all(found[key] is not None and abs(found[key] - order) < ORDER_TOLERANCE for key, order in wanted.items())


def _rms(value: Tensor) -> float:
    return float(value.detach().square().mean().sqrt())


def plot(rows: Sequence[Row], path: Path) -> None:
    """Dropped loss and dropped gradient of every step against the drift, both axes logarithmic; one row of panels per model."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(11, 3.6 * len(models) + 1.4), layout="constrained")
    panels = figure.subplots(len(models), 2, squeeze=False)
    names = {"loss_dropped": "dropped loss", "gradient_dropped": "dropped gradient / gradient"}
    for line, model in zip(panels, models, strict=True):
        for axes, (key, title) in zip(line, names.items(), strict=True):
            for i, row in enumerate(row for row in rows if row["model"] == model):
                # Rounding is not shown; where a step drops nothing it has no line.
                shown = [(point["h_rms"], point[key]) for point in row["points"] if point[key] > 1e-15]
                axes.loglog([h for h, _ in shown], [value for _, value in shown], "o-", color=f"C{i}", label=row["step"])
            axes.set(title=f"{model}: {title}", xlabel="drift: rms h, nats")
            axes.grid(alpha=0.25)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(
        "What each Taylor step drops (6 pairs of unequal lengths, n = 1 direction: down DPO's gradient)", fontsize=10
    )
    figure.savefig(path, dpi=150)
