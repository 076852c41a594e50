"""R9: what wrong picks do. A flip rate e leaves 1 - 2e of the gradient; at e = .5 nothing is learned and nothing may pass.

At policy = reference the gradient of DPO's loss is -(beta/2) grad h for a pair and +(beta/2) grad h for the flipped one, so
flips of share e leave (1 - 2e) of it in expectation. Away from the reference -beta (sigmoid(-beta h) - e) grad h is left,
which is no multiple of the clean gradient: cDPO is that expectation exactly, and rDPO's own expectation is the clean gradient
exactly, wherever the policy stands.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pairloop.config import GateSection
from pairloop.lab.claims import drawing
from pairloop.lab.claims.base import Claim, Data, Outcome, Settings, markdown_table
from pairloop.lab.claims.duels import borders, promoted_at, promoted_at_by_z_test
from pairloop.learner.data import TokenGroup
from pairloop.learner.scores import group_logps
from pairloop.objective import OBJECTIVES, Batch, ObjectiveSettings
from pairloop.policy.protocols import TokenCompletion
from pairloop.policy.scoring import load_causal_lm
from pairloop.starter import MODEL_DIR, corpus, customers
from pairloop.template import ChatTemplate
from pairloop.types import Message

FLIP_RATE = 0.2
NEAR = 0.02
EXACT = 1e-9
DUELS = 80
"""Duels of coins; the gate may promote alpha of them."""
DRIFT_STEPS, DRIFT_RATE = 3, 1e-3
LOOK_EVERY = 50


@dataclass(frozen=True, slots=True)
class Sizes:
    """Pairs of a batch; how often the whole batch is flipped anew in one block, and blocks, whose spread gives the error."""

    pairs: int = 64
    draws: int = 400
    blocks: int = 6
    flip_rates: tuple[float, ...] = (0.0, 0.1, FLIP_RATE, 0.3, 0.4, 0.5)


class Probe:
    """DPO's gradient on one batch of the starter's pairs, in float64, at the reference or ``drift`` steps away from it."""

    def __init__(self, groups: Sequence[TokenGroup], model: nn.Module, *, drift: int = 0) -> None:
        self._weights = list(model.parameters())
        with torch.no_grad():
            self._reference_BGT, self.mask_BGT = group_logps(model, groups)
        self._groups, self._model = groups, model
        self._forward()
        for _ in range(drift):
            parts = torch.autograd.grad(self.loss("dpo"), self._weights)
            with torch.no_grad():
                for weight, part in zip(self._weights, parts, strict=True):
                    weight.sub_(DRIFT_RATE * part.sign())
            self._forward()

    def _forward(self) -> None:
        self._logp_BGT, _ = group_logps(self._model, self._groups)

    def loss(self, name: str, flipped_KB: Tensor | None = None, settings: ObjectiveSettings | None = None) -> Tensor:
        """The objective's loss, the mean over K draws of which of the B pairs are flipped (none: no pair is)."""
        n = len(self._groups)
        flipped_KB = torch.zeros(1, n, dtype=torch.bool) if flipped_KB is None else flipped_KB
        draws = len(flipped_KB)
        chosen_first = (~flipped_KB).flatten().double()
        batch = Batch(
            logp_BGT=self._logp_BGT.repeat(draws, 1, 1),
            ref_logp_BGT=self._reference_BGT.repeat(draws, 1, 1),
            mask_BGT=self.mask_BGT.repeat(draws, 1, 1),
            reward_BG=torch.stack([chosen_first, 1 - chosen_first], dim=1),
            weight_B=torch.ones(draws * n, dtype=torch.float64),
        )
        return OBJECTIVES[name].loss(batch, settings or ObjectiveSettings())

    def gradient(self, loss: Tensor) -> Tensor:
        """The loss's gradient with respect to all weights, as one vector."""
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, self._weights, retain_graph=True)])

    def gradient_of_logps(self, loss: Tensor) -> Tensor:
        """The loss's gradient with respect to the log-probs, [B, G, T]: the model's is a fixed linear map of it."""
        return torch.autograd.grad(loss, self._logp_BGT, retain_graph=True)[0]

    def margin(self) -> float:
        """Mean |h| in nats: how far the policy has gone."""
        d_BG = torch.where(self.mask_BGT, self._logp_BGT.detach() - self._reference_BGT, 0.0).sum(-1)
        return float((d_BG[:, 0] - d_BG[:, 1]).abs().mean())


def starter_pairs(seed: int, n: int) -> list[TokenGroup]:
    """Pairs of answers to the starter's cases, the one worth more to the customer first."""
    rng, template = random.Random(f"noise-{seed}"), ChatTemplate.load(MODEL_DIR)
    styles = list(corpus.STYLE_WEIGHTS)
    groups: list[TokenGroup] = []
    while len(groups) < n:
        case = corpus.draw_training_case(rng)
        answers = [corpus.write_answer(case, rng.choice(styles), rng) for _ in "ab"]
        better, worse = sorted(answers, key=lambda answer: -customers.utility(case, answer))
        if customers.utility(case, better) > customers.utility(case, worse):
            prompt = (Message("user", case.text),)
            tokens = tuple(TokenCompletion(template.encode_completion(prompt, text)) for text in (better, worse))
            groups.append(TokenGroup(f"pair-{len(groups)}", template.encode_prompt(prompt), tokens, (1.0, 0.0)))
    return groups


def measure_flips(seed: int, sizes: Sizes, settings: Settings) -> dict[str, Any]:
    """Share of the clean gradient that is left under flips, at each flip rate, at the reference and after some steps."""
    groups, generator = starter_pairs(seed, sizes.pairs), torch.Generator().manual_seed(seed)
    document: dict[str, Any] = {"pairs": sizes.pairs, "flips": sizes.pairs * sizes.draws * sizes.blocks}
    for name, drift in (("at_reference", 0), ("drifted", DRIFT_STEPS)):
        probe = Probe(groups, load_causal_lm(MODEL_DIR, dtype=torch.float64, trainable=True), drift=drift)
        clean = probe.gradient(probe.loss("dpo"))
        rows = []
        for done, rate in enumerate(sizes.flip_rates, 1):
            settings.on_progress(f"flipping picks, {name.replace('_', ' ')}", done, len(sizes.flip_rates))
            rows.append({"flip_rate": rate, **left_of(clean, probe, rate, sizes, generator)})
        document[name] = {"mean_margin_nats": probe.margin(), "rows": rows, **exact_errors(probe, FLIP_RATE)}
    return document


def left_of(clean: Tensor, probe: Probe, rate: float, sizes: Sizes, generator: torch.Generator) -> dict[str, float]:
    """<flipped, clean> / |clean|^2 over blocks of draws, its standard error, and the cosine of the mean with the clean one."""
    gradients = []
    for _ in range(sizes.blocks):
        flipped_KB = torch.rand(sizes.draws, sizes.pairs, generator=generator) < rate
        gradients.append(probe.gradient(probe.loss("dpo", flipped_KB)))
    left = torch.stack(gradients) @ clean / (clean @ clean)
    mean = torch.stack(gradients).mean(0)
    cosine = mean @ clean / (mean.norm() * clean.norm())
    return {"ratio": float(left.mean()), "error": float(left.std() / len(left) ** 0.5), "cosine": float(cosine)}


def exact_errors(probe: Probe, e: float) -> dict[str, float]:
    """cDPO and rDPO beside what flips of share e leave in expectation: relative errors, and share of the clean gradient."""
    smoothed = replace(ObjectiveSettings(), label_smoothing=e)
    all_flipped = torch.ones(1, len(probe.mask_BGT), dtype=torch.bool)

    def expected(name: str, settings: ObjectiveSettings | None = None) -> Tensor:
        right = probe.gradient_of_logps(probe.loss(name, None, settings))
        return (1 - e) * right + e * probe.gradient_of_logps(probe.loss(name, all_flipped, settings))

    clean = probe.gradient_of_logps(probe.loss("dpo"))
    cdpo = probe.gradient_of_logps(probe.loss("cdpo", None, smoothed))
    rdpo = probe.gradient_of_logps(probe.loss("rdpo", None, smoothed))
    return {
        "cdpo_is_the_expectation": _relative(cdpo, expected("dpo")),
        "rdpo_expects_the_clean": _relative(expected("rdpo", smoothed), clean),
        "cdpo_ratio": float((cdpo * clean).sum() / clean.square().sum()),
        "rdpo_ratio": float((rdpo * clean).sum() / clean.square().sum()),
    }


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def coin_duels(seed: int, config: GateSection, duels: int = DUELS) -> dict[str, Any]:
    """Duels in which every pick is a coin, judged by the gate after every pick up to ``max_picks``."""
    generator = torch.Generator().manual_seed(seed)
    won_DN = torch.rand(duels, config.max_picks, generator=generator) < 0.5
    return {
        "alpha": config.alpha,
        "duels": duels,
        "picks": config.max_picks,
        "promoted": int((promoted_at(won_DN, borders(config)) > 0).sum()),
        "promoted_by_z_test": int((promoted_at_by_z_test(won_DN, every=LOOK_EVERY) > 0).sum()),
    }


def _run(settings: Settings) -> dict[str, Any]:
    flips = measure_flips(settings.seed, Sizes(), settings)
    return {"gradient": flips, "coins": coin_duels(settings.seed, GateSection())}


def judge(data: Data) -> Outcome:
    """The ratio at the reference, cDPO and rDPO wherever the policy stands, and the coins."""
    gradient, coins = data["gradient"], data["coins"]
    row = next(row for row in gradient["at_reference"]["rows"] if row["flip_rate"] == FLIP_RATE)
    expected = 1 - 2 * FLIP_RATE
    exact = max(gradient[at][key] for at in _PLACES for key in _EXACT_KEYS)
    at_reference = gradient["at_reference"]
    slip = max(abs(at_reference["cdpo_ratio"] - expected), abs(at_reference["rdpo_ratio"] - 1 / expected))
    is_held = coins["promoted"] <= coins["alpha"] * coins["duels"] < coins["promoted_by_z_test"]
    passed = abs(row["ratio"] - expected) <= NEAR and max(exact, slip) < EXACT and is_held
    result = (
        f"{_plus_minus(row)} (standard error) of the gradient left at e = {FLIP_RATE:g} ({gradient['flips']:,} picks); "
        f"cDPO and rDPO as derived (relative error {max(exact, slip):.0e}); at e = .5 {coins['promoted']} of {coins['duels']} "
        f"duels promoted (a z-test looked at every {LOOK_EVERY} picks: {coins['promoted_by_z_test']})"
    )
    return Outcome(passed, result, _details(data))


_PLACES = ("at_reference", "drifted")
_EXACT_KEYS = ("cdpo_is_the_expectation", "rdpo_expects_the_clean")


def _details(data: Data) -> str:
    gradient, coins = data["gradient"], data["coins"]
    headers = (
        "flip rate e",
        "1 − 2e",
        "left of the gradient",
        "cosine with the clean one",
        "left after drift",
        "cosine after drift",
    )
    rows = [
        (
            f"{here['flip_rate']:g}",
            f"{1 - 2 * here['flip_rate']:.2f}",
            _plus_minus(here),
            f"{here['cosine']:.3f}",
            _plus_minus(there),
            f"{there['cosine']:.3f}",
        )
        for here, there in zip(*(gradient[at]["rows"] for at in _PLACES), strict=True)
    ]
    drift = gradient["drifted"]["mean_margin_nats"]
    return (
        f"{markdown_table(headers, rows)}\n\n"
        f"± standard error. DPO on {gradient['pairs']} pairs of the starter, all its weights, float64. The law holds where "
        f"policy = reference, so at the start of a round. After drift (mean |h| = {drift:.1f} nats) less is left, for what is "
        "already learned weighs less and what is flipped weighs more; cDPO is this expectation and rDPO undoes it, there too."
        f"\n\nThe {coins['duels']} duels are simulated: coins for picks, the gate's own decision after every pick up to "
        f"{coins['picks']:,}. Rounds that really trained on coins and duelled for coins are in docs/LOG.md "
        "(*Null duels: picks by coin*)."
    )


def _plus_minus(row: Data) -> str:
    return f"{row['ratio']:.3f} ± {row['error']:.3f}"


def plot(data: Data, path: Path) -> None:
    """What is left of the gradient against the flip rate, beside 1 - 2e; bars of two standard errors."""
    rates = [row["flip_rate"] for row in data["gradient"]["at_reference"]["rows"]]
    with drawing.axes(path, xlabel="flip rate e", ylabel="share of the clean gradient left") as axes:
        axes.plot(rates, [1 - 2 * rate for rate in rates], color=drawing.GREY, label="1 − 2e")
        for at, colour, label in (("at_reference", drawing.BLUE, "at the reference"), ("drifted", drawing.RED, "after drift")):
            rows = data["gradient"][at]["rows"]
            bars = [2 * row["error"] for row in rows]
            axes.errorbar(rates, [row["ratio"] for row in rows], yerr=bars, fmt="o", color=colour, ms=5, capsize=3, label=label)
        axes.axhline(0, color=drawing.GREY, lw=0.8, ls=":")


R9 = Claim(
    id="R9",
    title="Label noise of flip rate e scales the gradient by 1 − 2e",
    threshold=f"at the reference {1 - 2 * FLIP_RATE:.2f} ± {NEAR:g} at e = {FLIP_RATE:g}; cDPO and rDPO exact to {EXACT:g}; "
    f"at e = .5 promotions within the gate's α over {DUELS} duels",
    command="pairloop lab claim R9",
    judge=judge,
    run=_run,
    plot=plot,
)
