"""What the objectives do on average: exact expectations over every group of a small world (R2), and simulated weights (R3).

The claims: one online DPO step, ties counted as 0, is an unbiased step up the expected reward; on discordant pairs alone it
climbs logit p; GRPO with groups of G climbs p scaled by c_G(p), from 1 (G = 2) to the slope of 2 asin sqrt p (G without end).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pairloop.lab.probes import gradient, trainable
from pairloop.lab.worlds import Groups, World, batch_of, every_group, make_world, success, world_logps
from pairloop.objective import OBJECTIVES, Batch, Objective, ObjectiveSettings
from pairloop.objective.batch import is_tied

Objectives = Mapping[str, Objective]
Row = dict[str, Any]

EXACT, SIMULATED = 1e-9, 0.02
BETA = 0.1
FLIP_RATE = 0.2
N_WORLDS = 2
SUMMED = ObjectiveSettings(beta=BETA, loss_mean="sum")

SUCCESS_RATES = (0.03, 0.10, 0.30, 0.50)
GROUP_SIZES = (2, 4, 8, 16)
WITHOUT_END = 4096
"""Group size that stands for G without end in the simulation."""

CLAIMED_WEIGHT = {
    0.03: (1.0, 1.72, 2.54, 3.48, 5.86),
    0.10: (1.0, 1.69, 2.33, 2.85, 3.33),
    0.30: (1.0, 1.64, 1.96, 2.09, 2.18),
    0.50: (1.0, 1.62, 1.86, 1.93, 2.00),
}
"""c_G(p) for G = 2, 4, 8, 16 and without end, as claimed."""

_DRAWS, _DRAWS_WIDE = 1 << 21, 1 << 20
"""Completions for each figure, and for each of groups of 8 and more, of which fewer are tied: standard errors below .5 %."""

_CHUNK = 1 << 17


def expectations(*, seed: int, objectives: Objectives = OBJECTIVES) -> list[Row]:
    """R2, then R3: rows of ``claim, name, expected, value, relative_error, tolerance, holds``."""
    return [*exact_rows(seed=seed, objectives=objectives), *simulated_rows(seed=seed, objectives=objectives)]


# ---- R2, by enumeration


@dataclass(frozen=True, slots=True)
class _Enumerated:
    """A world with its policy's log-probs; the policy is the sampler and the reference."""

    world: World
    parameters: list[nn.Parameter]
    logp_PYT: Tensor
    mask_PYT: Tensor
    objectives: Objectives

    @property
    def logp_PY(self) -> Tensor:
        return self.logp_PYT.sum(-1)

    @property
    def p_P(self) -> Tensor:
        return success(self.world.reward_PY, self.logp_PY)

    def pulled(self, name: str, groups: Groups, weight_B: Tensor, settings: ObjectiveSettings = SUMMED) -> Tensor:
        """The objective's gradient, groups weighed by their probability: mean over prompts of E[grad L]."""
        batch = batch_of(groups, self.logp_PYT, self.logp_PYT.detach(), self.mask_PYT, weight_B)
        return gradient(self.objectives[name].loss(batch, settings), self.parameters)

    def expected(self, name: str, size: int = 2, settings: ObjectiveSettings = SUMMED) -> Tensor:
        groups = every_group(self.world, size)
        return self.pulled(name, groups, groups.probability_B(self.logp_PY), settings)

    def slope(self, value: Tensor) -> Tensor:
        return gradient(value, self.parameters)


def _discordant(it: _Enumerated) -> Tensor:
    """E[grad L_DPO] given that the rewards differ."""
    groups = every_group(it.world, 2).usable()
    p_P = it.p_P.detach()
    return it.pulled("dpo", groups, groups.probability_B(it.logp_PY) / (2 * p_P * (1 - p_P))[groups.prompt_B])


def _flipped(it: _Enumerated) -> Tensor:
    """E[grad L_DPO] where a share of the labels is turned round."""
    groups = every_group(it.world, 2)
    weight_B = groups.probability_B(it.logp_PY)
    turned = replace(groups, reward_BG=1 - groups.reward_BG)
    return (1 - FLIP_RATE) * it.pulled("dpo", groups, weight_B) + FLIP_RATE * it.pulled("dpo", turned, weight_B)


def _known_p(it: _Enumerated) -> Tensor:
    """E[-A grad s] with the advantage of a group without end, A = (r - p) / sqrt(p (1 - p))."""
    p_P1 = it.p_P.detach()[:, None]
    advantage_PY = (it.world.reward_PY - p_P1) / (p_P1 * (1 - p_P1)).sqrt()
    return -it.slope((it.logp_PY.exp() * advantage_PY).sum(-1).mean())


_EXACT_CLAIMS: tuple[tuple[str, Callable[[_Enumerated], Tensor], Callable[[_Enumerated], Tensor]], ...] = (
    (
        "E[grad L_DPO], ties as 0 = -beta grad E[r]",
        lambda it: it.expected("dpo"),
        lambda it: -BETA * it.slope(it.p_P.mean()),
    ),
    (
        "E[grad L_DPO | rewards differ] = -(beta/2) grad logit p",
        _discordant,
        lambda it: -BETA / 2 * it.slope(it.p_P.logit().mean()),
    ),
    (
        f"E[grad L_DPO], labels flipped at e = {FLIP_RATE:g} = -(1 - 2e) beta grad E[r]",
        _flipped,
        lambda it: -(1 - 2 * FLIP_RATE) * BETA * it.slope(it.p_P.mean()),
    ),
    ("E[grad L_GRPO], G = 2 = -grad p", lambda it: it.expected("grpo"), lambda it: -it.slope(it.p_P.mean())),
    (
        "E[grad L_GRPO], G = 2, sample std = -grad p / sqrt 2",
        lambda it: it.expected("grpo", settings=replace(SUMMED, advantage_std="sample")),
        lambda it: -it.slope(it.p_P.mean()) / math.sqrt(2),
    ),
    (
        "E[grad L_GRPO], G = 3 = -sqrt 2 grad p",
        lambda it: it.expected("grpo", 3),
        lambda it: -math.sqrt(2) * it.slope(it.p_P.mean()),
    ),
    ("E[grad L_RLOO], G = 3 = -grad p", lambda it: it.expected("rloo", 3), lambda it: -it.slope(it.p_P.mean())),
    (
        "E[grad L_DrGRPO], G = 3 = -(2/3) grad p",
        lambda it: it.expected("dr_grpo", 3),
        lambda it: -2 / 3 * it.slope(it.p_P.mean()),
    ),
    ("E[-A grad s], p known = -grad 2 asin sqrt p", _known_p, lambda it: -2 * it.slope(it.p_P.sqrt().asin().mean())),
)


def exact_rows(*, seed: int, objectives: Objectives = OBJECTIVES, n_worlds: int = N_WORLDS) -> list[Row]:
    """R2: the worst of ``n_worlds`` worlds for each claim; ``expected`` and ``value`` are the gradients' norms there."""
    worlds = [_enumerate(make_world(seed + i, n_prompts=2), objectives) for i in range(n_worlds)]
    rows = []
    for name, measured, claimed in _EXACT_CLAIMS:
        figures = []
        for it in worlds:
            found, wanted = measured(it), claimed(it)
            figures.append((float((found - wanted).norm() / wanted.norm()), float(wanted.norm()), float(found.norm())))
        error, expected, value = max(figures)
        rows.append(_row("R2", name, expected, value, error, EXACT))
    total = max(float((it.logp_PY.detach().exp().sum(-1) - 1).abs().max()) for it in worlds)
    return [*rows, _row("R2", "the enumerated completions' probabilities sum to 1", 1.0, 1.0 + total, total, EXACT)]


def _enumerate(world: World, objectives: Objectives) -> _Enumerated:
    logp_PYT, mask_PYT = world_logps(world, world.model)
    return _Enumerated(world, trainable(world.model), logp_PYT, mask_PYT, objectives)


# ---- R3, by simulation


def group_weight(p: float, size: int) -> float:
    """c_G(p) = E[sqrt(k (G - k))] / (G p (1 - p)), k successes of G: what GRPO with the population std scales grad p by."""
    total = sum(
        math.comb(size, k) * p**k * (1 - p) ** (size - k) * math.sqrt(k * (size - k))
        for k in range(1, size)  # a group with k = 0 or G is tied
    )
    return total / (size * p * (1 - p))


def usable_share(p: float, size: int) -> float:
    """1 - p^G - (1 - p)^G: groups whose rewards are not all equal."""
    return 1 - p**size - (1 - p) ** size


def simulated_rows(*, seed: int, objectives: Objectives = OBJECTIVES, rates: Sequence[float] = SUCCESS_RATES) -> list[Row]:
    """R3: c_G(p) with both stds as the GRPO objective gives it on simulated groups, and the share of usable groups."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for p in rates:
        for size, claimed in zip((*GROUP_SIZES, WITHOUT_END), CLAIMED_WEIGHT[p], strict=True):
            endless = size == WITHOUT_END
            figures = _simulate(p, size, generator, objectives["grpo"])
            label = f"G = {'inf' if endless else size}, p = {p:g}"
            exact = 1 / math.sqrt(p * (1 - p)) if endless else group_weight(p, size)
            at = {"p": p, "group_size": None if endless else size, "groups": figures.groups}
            rows.append(_compared(f"c_G(p), {label}", exact, figures.population, claimed) | at)
            if not endless:
                sample = math.sqrt((size - 1) / size)
                rows.append(_compared(f"c_G(p), sample std, {label}", sample * exact, figures.sample, sample * claimed) | at)
                share = usable_share(p, size)
                rows.append(_compared(f"usable groups, {label}", share, figures.usable, share) | at)
    return rows


@dataclass(frozen=True, slots=True)
class _Simulated:
    population: float
    sample: float
    usable: float
    groups: int


def _simulate(p: float, size: int, generator: torch.Generator, grpo: Objective) -> _Simulated:
    """Groups of coin flips from a policy with one parameter, its logit; c is its GRPO gradient over that of p."""
    theta = torch.tensor(p, dtype=torch.float64).logit().requires_grad_()
    n_groups, population, sample, usable = 0, 0.0, 0.0, 0.0
    for batch in _coin_groups(p, size, theta, generator):
        n = len(batch.weight_B)
        population += n * _slope(grpo.loss(batch, SUMMED), theta)
        sample += n * _slope(grpo.loss(batch, replace(SUMMED, advantage_std="sample")), theta)
        usable += float((~is_tied(batch)).sum())
        n_groups += n
    scale = -n_groups * p * (1 - p)  # d p / d logit = p (1 - p); the loss goes down where p goes up
    return _Simulated(population / scale, sample / scale, usable / n_groups, n_groups)


def _coin_groups(p: float, size: int, theta: Tensor, generator: torch.Generator) -> Iterator[Batch]:
    """Completions of one token each, in batches that fit a cache."""
    per_batch = max(1, _CHUNK // size)
    for _ in range((_DRAWS if size < 8 else _DRAWS_WIDE) // (per_batch * size)):
        reward_BG = (torch.rand(per_batch, size, generator=generator, dtype=torch.float64) < p).double()
        signed_BG = theta * (2 * reward_BG - 1)  # log p = log sigmoid(theta), log(1 - p) = log sigmoid(-theta)
        logp_BGT = torch.nn.functional.logsigmoid(signed_BG)[..., None]
        mask_BGT = torch.ones_like(logp_BGT, dtype=torch.bool)
        yield Batch(logp_BGT, logp_BGT.detach(), mask_BGT, reward_BG, torch.ones(per_batch, dtype=torch.float64))


def _slope(loss: Tensor, theta: Tensor) -> float:
    (slope,) = torch.autograd.grad(loss, theta, retain_graph=True)
    return float(slope)


def _compared(name: str, exact: float, value: float, claimed: float) -> Row:
    """Against the formula and against the printed table: both must be within the tolerance."""
    error = max(abs(value / exact - 1), abs(value / claimed - 1))
    return _row("R3", name, exact, value, error, SIMULATED) | {"claimed": claimed}


def _row(claim: str, name: str, expected: float, value: float, error: float, tolerance: float) -> Row:
    figures = {"expected": expected, "value": value, "relative_error": error, "tolerance": tolerance}
    return {"claim": claim, "name": name, **figures, "holds": error < tolerance}
