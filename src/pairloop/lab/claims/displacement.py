"""R12: on near-duplicates DPO pushes both answers down together, unseen by its loss; a term on the chosen one holds it."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from pairloop.config import TrainSection
from pairloop.lab.bases import load, one_thread
from pairloop.lab.claims.base import Claim, Data, Outcome, Settings, markdown_table
from pairloop.lab.tasks import TASKS
from pairloop.lab.tasks.base import Problem, Task, heldout_problem, training_problem
from pairloop.learner.checkpoint import trained
from pairloop.learner.data import TokenGroup
from pairloop.learner.memory import TokenBudget
from pairloop.learner.scores import References, score
from pairloop.learner.step import Trainer, optimizer_of
from pairloop.policy.protocols import TokenCompletion
from pairloop.policy.rollout import sample

TASK = "caesar"
PAIRS, HELDOUT, BATCH = 1_024, 128, 16
SEEDS = 3
GUARDS: dict[str, dict[str, Any]] = {
    "plain DPO": {"objective": "dpo"},
    "DPO + NLL 1": {"objective": "dpo", "nll_weight": 1.0},
    "DPOP": {"objective": "dpop"},
}
PLAIN, GUARDED = "plain DPO", "DPO + NLL 1"
FLOOR = -0.1
"""Nats per token that the chosen answers of held-out pairs may lose under the guard."""


def run(settings: Settings) -> dict[str, object]:
    """Mean log-ratio per token of chosen and rejected answers of held-out pairs, after one pass, by guard and seed."""
    task = TASKS[TASK]
    rows = []
    jobs = [(seed, name) for seed in range(settings.seed, settings.seed + SEEDS) for name in GUARDS]
    with tempfile.TemporaryDirectory() as cache, one_thread():
        for done, (seed, name) in enumerate(jobs):
            settings.on_progress(f"{name}, seed {seed}", done, len(jobs))
            section = TrainSection.model_validate({"learning_rate": 1e-3, "beta": 0.1, **GUARDS[name]})
            chosen, rejected = _train(task, load(task, Path(cache)), section, seed)
            rows.append({"guard": name, "seed": seed, "d_chosen_per_token": chosen, "d_rejected_per_token": rejected})
    return {"task": TASK, "pairs": PAIRS, "heldout": HELDOUT, "beta": 0.1, "learning_rate": 1e-3, "rows": rows}


def _train(task: Task, model: nn.Module, section: TrainSection, seed: int) -> tuple[float, float]:
    rng = random.Random(f"displacement-{seed}")
    train = near_duplicates(task, model, PAIRS, training_problem, rng, "train")
    heldout = near_duplicates(task, model, HELDOUT, heldout_problem, rng, "heldout")
    both = [*train, *heldout]
    reference = {group.group_id: logps for group, logps in zip(both, score(model, both), strict=True)}
    parameters = list(trained(model).values())
    trainer = Trainer(
        model,
        optimizer_of(parameters, section),
        parameters,
        References(reference),
        section,
        TokenBudget(section.max_tokens_per_batch),
    )
    for start in range(0, len(train), BATCH):
        trainer.step(train[start : start + BATCH], section.learning_rate)
    now = score(model, heldout)
    chosen, rejected = (
        fmean(float((logps[side] - reference[group.group_id][side]).mean()) for group, logps in zip(heldout, now, strict=True))
        for side in (0, 1)
    )
    return chosen, rejected


def near_duplicates(
    task: Task, model: nn.Module, count: int, draw: Callable[[Task, random.Random], Problem], rng: random.Random, name: str
) -> list[TokenGroup]:
    """Pairs of a sampled answer (rejected) and the same with one wrong token set right (chosen)."""
    found: list[TokenGroup] = []
    while len(found) < count:
        problems = [draw(task, rng) for _ in range(count - len(found))]
        prompts = [task.tokens.encode_prompt(problem.prompt) for problem in problems]
        sampled = sample(model, prompts, group_size=1, max_tokens=task.recipe.max_tokens, eos=task.tokens.eos_id, rng=rng)
        for problem, prompt, (answer,) in zip(problems, prompts, sampled, strict=True):
            better = _mended(answer.token_ids, task.tokens.encode_completion(problem.prompt, problem.target), rng)
            if better is not None:
                pair = (TokenCompletion(better), TokenCompletion(answer.token_ids))
                found.append(TokenGroup(f"{name}-{len(found)}", tuple(prompt), pair, (1.0, 0.0)))
    return found


def _mended(answer: Sequence[int], right: Sequence[int], rng: random.Random) -> tuple[int, ...] | None:
    """The answer with one of its wrong tokens replaced by the right one; None where none is. The end stays where it is."""
    wrong = [t for t in range(min(len(answer), len(right)) - 1) if answer[t] != right[t]]
    if not wrong:
        return None
    t = rng.choice(wrong)
    return (*answer[:t], right[t], *answer[t + 1 :])


def judge(data: Data) -> Outcome:
    """Every seed: d+ below 0 without the guard, and not below the floor with it."""

    def of(guard: str) -> list[float]:
        return [float(row["d_chosen_per_token"]) for row in data["rows"] if row["guard"] == guard]

    plain, guarded = of(PLAIN), of(GUARDED)
    if not plain or not guarded:
        return Outcome(None, f"the data lack {PLAIN} or {GUARDED}")
    passed = max(plain) < 0 and min(guarded) >= FLOOR
    result = (
        f"d⁺ per token on held-out pairs: {PLAIN} from {min(plain):.2f} to {max(plain):.2f} nats, "
        f"{GUARDED} from {min(guarded):.3f} to {max(guarded):.3f} ({len(plain)} seeds)"
    )
    rows = [
        (row["guard"], str(row["seed"]), *(f"{row[f'd_{side}_per_token']:+.3f}" for side in ("chosen", "rejected")))
        for row in data["rows"]
    ]
    return Outcome(passed, result, markdown_table(("objective", "seed", "d⁺ per token", "d⁻ per token"), rows))


R12 = Claim(
    id="R12",
    title="Likelihood displacement, and its guard",
    threshold="d⁺ < 0 on near-duplicates without the guard, ≥ −.1 nat per token with it, on every seed",
    command="pairloop lab claim R12",
    judge=judge,
    run=run,
)
