"""How DPO on frozen pairs stops being a policy gradient: the two gradients' cosine as the policy leaves what sampled.

Small worlds, enumerated: all pairs the sampler can draw, weighed by their probability, are trained on with DPO (Adam); on the
way, where KL(policy || sampler) reaches the grid, the DPO gradient of those pairs is compared with the true policy gradient,
that of the expected reward under the policy as it then is. No sampling noise: what is lost is lost to drift alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pairloop.lab.expectations import Objectives
from pairloop.lab.probes import cosine_distance, gradient, trainable
from pairloop.lab.worlds import Groups, World, batch_of, every_group, make_world, success, world_logps
from pairloop.objective import OBJECTIVES, ObjectiveSettings

Row = dict[str, Any]

KL_GRID = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Nats per sequence."""

N_SEEDS = 6
BETA = 0.1
LEARNING_RATE = 1e-3
MAX_STEPS = 400
COSINE_TOLERANCE = 1e-12
_GAIN = 4.0
_BISECTIONS = 12


def drift_rows(
    *, seed: int, n_seeds: int = N_SEEDS, objectives: Objectives = OBJECTIVES, grid: Sequence[float] = KL_GRID
) -> list[Row]:
    """From KL 0 on: rows of ``seed, target_kl, kl, ess, cosine``, exact; at KL 0 also ``holds``: the cosine is 1."""
    return [row for s in range(seed, seed + n_seeds) for row in _walk(s, objectives, grid)]


def _walk(seed: int, objectives: Objectives, grid: Sequence[float]) -> list[Row]:
    """One world's path; ends early where the pairs have no further to push."""
    walk = _Walk.start(make_world(seed, gain=_GAIN), objectives)
    optimizer = torch.optim.Adam(walk.parameters, LEARNING_RATE)
    rows = [walk.measure(seed, 0.0)]
    for target in grid[1:]:
        for _ in range(MAX_STEPS):
            if walk.kl() >= target:
                break
            before = [parameter.detach().clone() for parameter in walk.parameters]
            optimizer.zero_grad()
            walk.loss(walk.logps()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        else:
            break
        walk.back_to(target, before)
        rows.append(walk.measure(seed, target))
    return rows


@dataclass(frozen=True, slots=True)
class _Walk:
    """A policy on its way from the sampler, the frozen pairs, and the exact figures of where it is."""

    world: World
    model: nn.Module
    parameters: list[nn.Parameter]
    pairs: Groups
    weight_B: Tensor
    sampler_PYT: Tensor
    mask_PYT: Tensor
    objectives: Objectives

    @classmethod
    def start(cls, world: World, objectives: Objectives) -> _Walk:
        pairs = every_group(world, 2).usable()
        with torch.no_grad():
            sampler_PYT, mask_PYT = world_logps(world, world.model)
        weight_B = pairs.probability_B(sampler_PYT.sum(-1))
        model = deepcopy(world.model)
        return cls(world, model, trainable(model), pairs, weight_B, sampler_PYT, mask_PYT, objectives)

    def logps(self) -> Tensor:
        return world_logps(self.world, self.model)[0]

    def loss(self, logp_PYT: Tensor) -> Tensor:
        batch = batch_of(self.pairs, logp_PYT, self.sampler_PYT, self.mask_PYT, self.weight_B)
        return self.objectives["dpo"].loss(batch, ObjectiveSettings(beta=BETA))

    @torch.no_grad()
    def kl(self) -> float:
        """KL(policy || sampler), nats per sequence, mean over prompts."""
        logp_PY, sampler_PY = self.logps().sum(-1), self.sampler_PYT.sum(-1)
        return float((logp_PY.exp() * (logp_PY - sampler_PY)).sum(-1).mean())

    @torch.no_grad()
    def back_to(self, target: float, before: Sequence[Tensor]) -> None:
        """From the step that passed ``target`` back along it to where KL is ``target``."""
        after = [parameter.clone() for parameter in self.parameters]
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            share = (low + high) / 2
            for parameter, start, end in zip(self.parameters, before, after, strict=True):
                parameter.copy_(start + share * (end - start))
            low, high = (low, share) if self.kl() >= target else (share, high)

    def measure(self, seed: int, target: float) -> Row:
        logp_PYT = self.logps()
        logp_PY, sampler_PY = logp_PYT.sum(-1), self.sampler_PYT.sum(-1)
        # E under the sampler of w = policy / sampler is 1, so ESS = (E w)^2 / E w^2 = 1 / E w^2.
        ess = 1 / float((2 * logp_PY.detach() - sampler_PY).exp().sum(-1).mean())
        uphill = gradient(success(self.world.reward_PY, logp_PY).mean(), self.parameters)
        distance = cosine_distance(-gradient(self.loss(logp_PYT), self.parameters), uphill)
        row: Row = {"seed": seed, "target_kl": target, "kl": self.kl(), "ess": ess, "cosine": 1 - distance}
        return row | ({"holds": distance < COSINE_TOLERANCE} if target == 0 else {})


def summarise(rows: Sequence[Row]) -> list[Row]:
    """For each KL of the grid: ``n`` seeds, and lowest, mean and highest of ESS and cosine."""
    summary = []
    for target in sorted({row["target_kl"] for row in rows}):
        at = [row for row in rows if row["target_kl"] == target]
        figures: Row = {"kl": target, "n": len(at)}
        for key in ("ess", "cosine"):
            values = [row[key] for row in at]
            figures[key] = {"low": min(values), "mean": sum(values) / len(values), "high": max(values)}
        summary.append(figures)
    return summary


def plot(rows: Sequence[Row], path: Path) -> None:
    """Cosine and ESS against KL: a line for each seed, the mean over them thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    seeds, summary = sorted({row["seed"] for row in rows}), summarise(rows)
    for key, colour, name in (("ess", "tab:orange", "ESS of the frozen pairs' completions"), ("cosine", "tab:blue", "cosine")):
        for seed in seeds:
            own = [row for row in rows if row["seed"] == seed]
            axes.plot([row["kl"] for row in own], [row[key] for row in own], color=colour, alpha=0.3, linewidth=1)
        means = [at[key]["mean"] for at in summary]
        axes.plot([at["kl"] for at in summary], means, "o-", color=colour, linewidth=2.5, label=f"{name}, mean")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.axhline(0.8, color="tab:orange", linewidth=1, linestyle=":", label="ESS = .8")
    axes.set(xlabel="KL(policy || sampler), nats per sequence", ylabel="cosine · ESS", ylim=(None, 1.04), xlim=(0, None))
    axes.set_title(f"DPO on frozen pairs against the true policy gradient (exact, n = {len(seeds)} small nets)", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
