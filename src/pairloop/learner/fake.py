"""Training of the policy without a model: the new version is the parent's skill plus one. No torch.

The rows it reports are real: computed from the fake policy's own log-probs, before the change in the first step and after it in
the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pairloop.formats.snapshot import HELDOUT_FILE
from pairloop.learner.controller import RoundController
from pairloop.learner.data import Limits, TokenGroup, epoch_batches, read_split, tokenize
from pairloop.learner.files import whole_folder
from pairloop.learner.job import TrainJob, TrainResult, TrainStatus, nothing_to_train, rewind_metrics
from pairloop.learner.metrics import MetricsFile, libraries
from pairloop.policy import fake
from pairloop.types import PreferencePair


def train_fake(job: TrainJob, pairs: Sequence[PreferencePair], report: Callable[[Mapping[str, Any]], None]) -> TrainResult:
    """Write ``fake.json`` with the next skill, and one metrics row per batch."""
    started_s = time.monotonic()
    skill = fake.read_skill(Path(job.parent_path)) if job.parent_path else 0
    limits = Limits(min(job.train.max_length, job.max_context or job.train.max_length), fake.EOS + 1)
    usable, dropped = tokenize(pairs, fake.FakeTokens(), limits, parent_version=job.parent_version)
    if len(usable) < job.train.min_pairs:
        return nothing_to_train(len(usable), dropped)
    heldout, _ = tokenize(
        read_split(Path(job.snapshot_dir), HELDOUT_FILE), fake.FakeTokens(), limits, parent_version=job.parent_version
    )
    batches = [
        batch
        for epoch in range(job.train.epochs)
        for batch in epoch_batches(len(usable), job.train.batch_size, seed=job.train.seed, epoch=epoch)
    ]
    rewind_metrics(Path(job.metrics_path), 0)
    row: dict[str, Any] = {}
    ess: list[float] = []
    controller, stop = RoundController(job.train), None
    with MetricsFile(Path(job.metrics_path), report) as metrics:
        for step, batch in enumerate(batches, start=1):
            found = _measure([usable[i] for i in batch], skill, skill if step == 1 else skill + 1, job.train.beta)
            row = {
                "step": step,
                "of": len(batches),
                **found,
                "grad_norm": 1.0,
                "lr": job.train.learning_rate,
                "tokens_per_s": 0.0,
            }
            metrics.write(row)
            ess.append(found["ess"])
            stop = controller.after_step(row)
            if stop is not None:
                break
    with whole_folder(Path(job.out_dir)) as folder:
        fake.write_skill(folder, skill + 1)
    return TrainResult(
        TrainStatus.SUCCEEDED,
        steps=row["step"],
        steps_planned=len(batches),
        pairs=len(usable),
        metrics={key: value for key, value in row.items() if isinstance(value, float)}
        | {"ess_mean": fmean(ess), "ess_min": min(ess)},
        reference={"recorded": sum(pair.is_fresh for pair in usable), "scored": sum(not pair.is_fresh for pair in usable)},
        dropped=dict(dropped),
        heldout_before=_measure(heldout, skill, skill, job.train.beta),
        heldout_after=_measure(heldout, skill, skill + 1, job.train.beta),
        stopped_because=stop.reason if stop is not None else "",
        stop_message=stop.message if stop is not None else "",
        weights_step=row["step"],
        warnings=controller.warnings,
        libraries=libraries(),
        cpu_s=time.process_time(),
        wall_s=time.monotonic() - started_s,
    )


def _measure(pairs: Sequence[TokenGroup], reference: int, policy: int, beta: float) -> dict[str, float]:
    """The metrics of `pairloop.objective.group_metrics`, in plain Python; empty without pairs."""
    if not pairs:
        return {}
    of_tokens = [
        (fake.token_logps(side.token_ids, policy), fake.token_logps(side.token_ids, reference)) for side in _sides(pairs)
    ]
    d = [sum(new) - sum(old) for new, old in of_tokens]
    d_chosen, d_rejected = d[: len(pairs)], d[len(pairs) :]
    h = [chosen - rejected for chosen, rejected in zip(d_chosen, d_rejected, strict=True)]
    w = [math.exp(value) for value in d]
    k3 = [sum(math.expm1(n - o) - (n - o) for n, o in zip(new, old, strict=True)) for new, old in of_tokens]
    return {
        "loss": fmean(math.log1p(math.exp(-beta * value)) for value in h),
        "reward_chosen": beta * fmean(d_chosen),
        "reward_rejected": beta * fmean(d_rejected),
        "margin": beta * fmean(h),
        "accuracy": fmean(0.5 + 0.5 * ((value > 0) - (value < 0)) for value in h),
        "d_chosen": fmean(d_chosen),
        "d_rejected": fmean(d_rejected),
        "d_chosen_per_token": fmean(
            value / len(pair.completions[0].token_ids) for value, pair in zip(d_chosen, pairs, strict=True)
        ),
        "nll_chosen": fmean(-sum(new) / len(new) for new, _ in of_tokens[: len(pairs)]),
        "ess": sum(w) ** 2 / (len(w) * sum(value**2 for value in w)),
        "kl": fmean(k3),
        "n": float(len(pairs)),
    }


def _sides(pairs: Sequence[TokenGroup]) -> list[Any]:
    return [pair.completions[side] for side in (0, 1) for pair in pairs]
