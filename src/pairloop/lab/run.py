"""One arm on one task with one seed: sample, score, train, sample again, and measure on held-out problems on the way."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from pairloop.config import TrainSection
from pairloop.lab.arms import Arm
from pairloop.lab.bases import load, one_thread
from pairloop.lab.tasks.base import Problem, Task, heldout_problem, training_problem
from pairloop.learner.checkpoint import trained
from pairloop.learner.controller import RoundController
from pairloop.learner.data import TokenGroup, epoch_batches
from pairloop.learner.measure import measure
from pairloop.learner.memory import TokenBudget
from pairloop.learner.passes import Passes
from pairloop.learner.reference import recorded
from pairloop.learner.scores import References, score
from pairloop.learner.step import Trainer, optimizer_of
from pairloop.policy.protocols import TokenCompletion
from pairloop.policy.rollout import sample

_Asked = tuple[list[int], list[TokenCompletion], list[float]]
"""A prompt's token ids, its completions, and their scores."""

EVALUATION_SEED = 10_007
"""All arms and seeds of a task are measured on the same held-out problems."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What every arm of a comparison may spend, and what it shares with the others.

    rollouts: completions sampled for training. completions_per_step: of one optimizer step, so that rollouts divided by it are
    the steps. learning_rate: AdamW's; 0: the task's own, which `pairloop.lab.compare.jobs_of` puts in. points: measurements on
    the way, at equal distances; the last at the end. problems: held-out ones per measurement on the way; final_problems: at
    the start and at the end.
    """

    rollouts: int = 4_096
    completions_per_step: int = 64
    learning_rate: float = 0.0
    points: int = 8
    problems: int = 256
    final_problems: int = 1_000

    @property
    def steps(self) -> int:
        return self.rollouts // self.completions_per_step


@dataclass(frozen=True, slots=True)
class Point:
    """The policy after so many rollouts, on held-out problems; nats per completion, tokens per completion."""

    rollouts: int
    score: float
    entropy: float
    kl_to_base: float
    length: float


@dataclass(frozen=True, slots=True)
class Run:
    """How one arm went.

    cpu_s and wall_s: by phase (sample, train, evaluate). ess: mean over its optimizer steps. stops: why each round ended.
    """

    arm: str
    task: str
    seed: int
    rollouts: int
    steps: int
    score: float
    greedy: float
    base_score: float
    ess: float
    d_chosen: float
    d_rejected: float
    ties: float
    curve: tuple[Point, ...]
    stops: tuple[str, ...]
    cpu_s: dict[str, float]
    wall_s: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(arm: Arm, task: Task, seed: int, budget: Budget, cache_dir: Path) -> Run:
    """Train the task's base as the arm says, measuring on the way."""
    with one_thread():
        runner = _Runner(arm, task, seed, budget, load(task, cache_dir))
        # The base as exactly as the end: every gain is measured from it.
        runner.measure(budget.final_problems)
        marks = [budget.steps * i // budget.points for i in range(1, budget.points)]
        for done in runner.steps():
            if marks and done >= marks[0]:
                runner.measure(budget.problems)
                marks = [mark for mark in marks if mark > done]
        runner.measure(budget.final_problems)
        return runner.result()


class _Runner:
    """The state of one run: the policy, what it has spent, and what was seen."""

    def __init__(self, arm: Arm, task: Task, seed: int, budget: Budget, model: nn.Module) -> None:
        self.arm, self.task, self.seed, self.budget, self.model = arm, task, seed, budget, model
        self.base = copy.deepcopy(model)
        self.settings = TrainSection.model_validate(
            {"learning_rate": budget.learning_rate * arm.rate, "warmup_steps": 0, **arm.train, "objective": arm.objective}
        )
        self.problem_rng = random.Random(f"problems-{task.name}-{seed}")
        self.sample_rng = random.Random(f"samples-{task.name}-{seed}")
        self.clock = _Clock()
        self.rows: list[dict[str, float]] = []
        self.curve: list[Point] = []
        self.stops: list[str] = []
        self.rollouts = self.groups = self.ties = 0

    def steps(self) -> Iterator[int]:
        """Sample and train; yields the steps of the budget that are done."""
        total = self.budget.steps
        per_sampling = total // self.arm.rounds if self.arm.rounds else self.arm.sync_steps or total
        trainer = self._trainer()
        for start in range(0, total, per_sampling):
            if self.rollouts >= self.budget.rollouts:  # spent on groups that were tied
                return
            width = min(per_sampling, total - start)
            with self.clock("sample"):
                groups = self._sample(width)
            if self.arm.rounds:
                trainer = self._trainer()
            heldout = groups[: int(len(groups) * self.arm.heldout_share)]
            batches = self._batches(groups[len(heldout) :], width, start)
            current = _Round(trainer, groups, self.arm.resync_steps)
            done = self._round(current, batches, heldout) if self.arm.rounds else self._fixed_rate(current, batches)
            for i in done:
                yield start + i * width // len(batches)
            if not batches:  # all groups tied: the budget is spent, and nothing was learned
                yield start + width

    def _fixed_rate(self, current: _Round, batches: Sequence[Sequence[TokenGroup]]) -> Iterator[int]:
        """One step per batch at the comparison's rate; yields how many are done."""
        for i, batch in enumerate(batches, start=1):
            with self.clock("train"):
                self.rows.append(current.step(batch, self.settings.learning_rate))
            yield i

    def _round(self, current: _Round, batches: Sequence[Sequence[TokenGroup]], heldout: Sequence[TokenGroup]) -> Iterator[int]:
        """The product's own round: warm-up, decay, and its controller, which may end it; yields how many steps are done."""
        if not batches:
            return
        look = partial(current.look, heldout) if heldout else None
        passes = Passes(self.model, self.settings, RoundController(self.settings), current.step, look)
        steps = passes.run(batches)
        while passes.stop is None:
            with self.clock("train"):
                row = next(steps)[0]
            self.rows.append(dict(row))
            yield row["step"]
        self.stops.append(passes.stop.reason)
        yield len(batches)

    def measure(self, problems: int) -> None:
        """One point of the curve, on the same held-out problems for all arms and seeds."""
        with self.clock("evaluate"):
            asked = self._answers(problems, greedy=False)
            groups = [TokenGroup(str(i), tuple(prompt), tuple(group), (0.0,)) for i, (prompt, group, _) in enumerate(asked)]
            own = [sum(group[0].logps) for _, group, _ in asked]
            base = [float(logps[0].sum()) for logps in score(self.base, groups)]
        self.curve.append(
            Point(
                rollouts=self.rollouts,
                score=fmean(scores[0] for _, _, scores in asked),
                entropy=-fmean(own),
                kl_to_base=fmean(mine - theirs for mine, theirs in zip(own, base, strict=True)),
                length=fmean(len(group[0].token_ids) for _, group, _ in asked),
            )
        )

    def result(self) -> Run:
        with self.clock("evaluate"):
            greedy = [scores[0] for _, _, scores in self._answers(self.budget.final_problems, greedy=True)]
        return Run(
            arm=self.arm.name,
            task=self.task.name,
            seed=self.seed,
            rollouts=self.rollouts,
            steps=len(self.rows),
            score=self.curve[-1].score,
            greedy=fmean(greedy),
            base_score=self.curve[0].score,
            ess=_mean(self.rows, "ess"),
            d_chosen=_mean(self.rows, "d_chosen"),
            d_rejected=_mean(self.rows, "d_rejected"),
            ties=self.ties / max(1, self.groups),
            curve=tuple(self.curve),
            stops=tuple(self.stops),
            cpu_s=self.clock.cpu_s,
            wall_s=self.clock.wall_s,
        )

    def _trainer(self) -> Trainer:
        parameters = list(trained(self.model).values())
        budget = TokenBudget(self.settings.max_tokens_per_batch)
        return Trainer(self.model, optimizer_of(parameters, self.settings), parameters, References({}), self.settings, budget)

    def _sample(self, steps: int) -> list[TokenGroup]:
        """The groups of so many steps from which the arm can learn, see `groups_of`."""
        arm = self.arm
        wanted = int(self.budget.completions_per_step * arm.share) // arm.group_size * steps
        if not arm.resamples:
            return self._groups(wanted)
        found: list[TokenGroup] = []
        while (missing := min(wanted - len(found), (self.budget.rollouts - self.rollouts) // arm.group_size)) > 0:
            found += self._groups(missing)
        return found

    def _groups(self, count: int) -> list[TokenGroup]:
        """What so many sampled groups teach: nothing where they are tied."""
        found: list[TokenGroup] = []
        problems = [training_problem(self.task, self.problem_rng) for _ in range(count)]
        for prompt, completions, scores in self._ask(problems, self.sample_rng, group_size=self.arm.group_size):
            self.rollouts += len(completions)
            self.groups += 1
            self.ties += min(scores) == max(scores)
            found += groups_of(self.arm, f"{self.groups}", prompt, completions, scores)
        return found

    def _batches(self, groups: Sequence[TokenGroup], steps: int, start: int) -> list[list[TokenGroup]]:
        if not groups:
            return []
        size = -(-len(groups) // steps)
        return [
            [groups[i] for i in batch]
            for epoch in range(self.settings.epochs if self.arm.rounds else 1)
            for batch in epoch_batches(len(groups), size, seed=self.seed + start, epoch=epoch)
        ]

    def _answers(self, count: int, *, greedy: bool) -> list[_Asked]:
        """One answer to each of the held-out problems, which are always the same."""
        rng = random.Random(EVALUATION_SEED)
        return self._ask([heldout_problem(self.task, rng) for _ in range(count)], rng, greedy=greedy)

    def _ask(
        self, problems: Sequence[Problem], rng: random.Random, *, group_size: int = 1, greedy: bool = False
    ) -> list[_Asked]:
        """The policy's completions of each problem, scored."""
        tokens = self.task.tokens
        prompts = [tokens.encode_prompt(problem.prompt) for problem in problems]
        limits = {"max_tokens": self.task.recipe.max_tokens, "eos": tokens.eos_id}
        sampled = sample(self.model, prompts, group_size=group_size, rng=rng, greedy=greedy, **limits)
        return [
            (prompt, group, [self.task.score(problem, tokens.decode(completion.token_ids)) for completion in group])
            for problem, prompt, group in zip(problems, prompts, sampled, strict=True)
        ]


def groups_of(
    arm: Arm, group_id: str, prompt: Sequence[int], completions: Sequence[TokenCompletion], scores: Sequence[float]
) -> list[TokenGroup]:
    """What an arm learns from one sampled group; nothing where the scores are equal and only differences teach.

    ``scores``: the group as it is, its scores the rewards. ``pair``: best against worst, as a person would pick; of groups of
    more than two, pairs from the outside in. ``best``: the completions with the group's best score, if it is above 0, reward 1
    (filtered imitation: equal ones are all kept).
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    make = partial(TokenGroup, prompt=tuple(prompt), is_fresh=True)
    if arm.group == "best":
        best = tuple(completions[i] for i in order if scores[i] == scores[order[0]] > 0)
        return [make(group_id, completions=best, rewards=(1.0,) * len(best))] if best else []
    if scores[order[0]] == scores[order[-1]]:
        return []
    if arm.group == "scores":
        return [make(group_id, completions=tuple(completions), rewards=tuple(scores))]
    return [
        make(f"{group_id}.{i}", completions=(completions[high], completions[low]), rewards=(1.0, 0.0))
        for i, (high, low) in enumerate(zip(order[: len(order) // 2], reversed(order), strict=False))
        if scores[high] > scores[low]
    ]


class _Round:
    """Training on the groups of one sampling; the reference is what sampled them until it is synced inside the round."""

    def __init__(self, trainer: Trainer, groups: Sequence[TokenGroup], resync_steps: int) -> None:
        self._sampler = {group.group_id: recorded(group) for group in groups}
        self._groups = groups
        self._trainer = replace(trainer, references=References(self._sampler))
        self._resync_steps = resync_steps
        self._done = 0

    def step(self, batch: Sequence[TokenGroup], lr: float) -> dict[str, float]:
        if self._resync_steps and self._done and self._done % self._resync_steps == 0:
            now = score(self._trainer.model, self._groups, self._trainer.budget)
            reference = {group.group_id: logps for group, logps in zip(self._groups, now, strict=True)}
            self._trainer = replace(self._trainer, references=References(reference, self._sampler))
        self._done += 1
        return self._trainer.step(batch, lr)

    def look(self, heldout: Sequence[TokenGroup]) -> dict[str, float]:
        """The metrics of held-out pairs as the policy stands."""
        logps = score(self._trainer.model, heldout, self._trainer.budget)
        return measure(self._trainer.settings, heldout, logps, self._trainer.references)


class _Clock:
    """CPU and wall seconds by phase."""

    def __init__(self) -> None:
        self.cpu_s: dict[str, float] = {}
        self.wall_s: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        cpu_s, wall_s = time.process_time(), time.monotonic()
        yield
        self.cpu_s[phase] = self.cpu_s.get(phase, 0.0) + time.process_time() - cpu_s
        self.wall_s[phase] = self.wall_s.get(phase, 0.0) + time.monotonic() - wall_s


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return fmean(row[name] for row in rows) if rows else 0.0
