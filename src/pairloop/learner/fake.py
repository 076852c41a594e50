"""Training of the policy without a model: the new version is the parent's skill plus one. No torch.

The rows it reports are real: computed from the fake policy's own log-probs, before the change in the first step and after it in
the others. It takes an instant, so a run that was stopped begins again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pairloop.formats.snapshot import HELDOUT_FILE
from pairloop.learner.controller import RoundController, Stop
from pairloop.learner.data import Limits, TokenGroup, epoch_batches, read_split, refuse_unfit, tokenize
from pairloop.learner.files import whole_folder
from pairloop.learner.job import TrainJob, TrainResult, TrainStatus, nothing_to_train, rewind_metrics
from pairloop.learner.metrics import MetricsFile, defined, libraries
from pairloop.policy import fake
from pairloop.types import TrainingRow


def train_fake(job: TrainJob, rows: Sequence[TrainingRow], report: Callable[[Mapping[str, Any]], None]) -> TrainResult:
    """Write ``fake.json`` with the next skill, and one metrics row per batch."""
    started_s = time.monotonic()
    skill = fake.read_skill(Path(job.parent_path)) if job.parent_path else 0
    usable, heldout, dropped = _data(job, rows)
    if len(usable) < job.train.min_pairs:
        return nothing_to_train(len(usable), dropped)
    taken, controller, stop = _run(job, usable, heldout, skill, report)
    with whole_folder(Path(job.out_dir)) as folder:
        fake.write_skill(folder, skill + 1)
    last = taken[-1]
    ess = [row["ess"] for row in taken if "ess" in row]
    return TrainResult(
        TrainStatus.SUCCEEDED,
        steps=last["step"],
        steps_planned=last["of"],
        pairs=len(usable),
        metrics={key: value for key, value in last.items() if isinstance(value, float)}
        | ({"ess_mean": fmean(ess), "ess_min": min(ess)} if ess else {}),
        reference={"recorded": sum(group.is_fresh for group in usable), "scored": sum(not group.is_fresh for group in usable)},
        dropped=dict(dropped),
        heldout_before=_measure(heldout, skill, skill, job.train.beta),
        heldout_after=_measure(heldout, skill, skill + 1, job.train.beta),
        stopped_because=stop.reason if stop is not None else "",
        stop_message=stop.message if stop is not None else "",
        weights_step=last["step"],
        warnings=controller.warnings,
        libraries=libraries(),
        trained_tokens=sum(row["tokens"] for row in taken),
        cpu_s=time.process_time(),
        wall_s=time.monotonic() - started_s,
    )


def _data(job: TrainJob, rows: Sequence[TrainingRow]) -> tuple[list[TokenGroup], list[TokenGroup], Mapping[str, int]]:
    limits = Limits(min(job.train.max_length, job.max_context or job.train.max_length), fake.EOS + 1)
    others = read_split(Path(job.snapshot_dir), HELDOUT_FILE)
    refuse_unfit(others, job.train.objective)
    (usable, dropped), (heldout, _) = (
        tokenize(part, fake.FakeTokens(), limits, parent_version=job.parent_version, objective=job.train.objective)
        for part in (rows, others)
    )
    return usable, heldout, dropped


def _run(
    job: TrainJob,
    usable: Sequence[TokenGroup],
    heldout: Sequence[TokenGroup],
    skill: int,
    report: Callable[[Mapping[str, Any]], None],
) -> tuple[list[dict[str, Any]], RoundController, Stop | None]:
    """The metrics rows of the steps up to where the controller stops them, as they were written, and why it did."""
    settings, controller = job.train, RoundController(job.train)
    epochs = [epoch_batches(len(usable), settings.batch_size, seed=settings.seed, epoch=e) for e in range(settings.epochs)]
    of, taken = sum(map(len, epochs)), list[dict[str, Any]]()
    stop = None
    rewind_metrics(Path(job.metrics_path), 0)
    with MetricsFile(Path(job.metrics_path), report) as metrics:
        for number, batches in enumerate(epochs, start=1):
            for batch in batches:
                groups = [usable[i] for i in batch]
                row = {"step": len(taken) + 1, "of": of, **_measure(groups, skill, skill + bool(taken), settings.beta)}
                tokens = sum(group.n_tokens for group in groups)
                row |= {"grad_norm": 1.0, "lr": settings.learning_rate, "tokens": tokens, "tokens_per_s": 0.0}
                metrics.write(row)
                taken.append(row)
                stop = controller.after_step(row)
                if stop is not None and len(taken) < of:
                    return taken, controller, stop
            if job.epochs_dir:
                metrics.write({"step": len(taken), "of": of, "epoch": _keep(job, number, len(taken), heldout, skill)})
    return taken, controller, stop


def _keep(job: TrainJob, number: int, step: int, heldout: Sequence[TokenGroup], skill: int) -> dict[str, Any]:
    folder = Path(job.epochs_dir, f"step-{step:08d}")
    with whole_folder(folder) as temporary:
        fake.write_skill(temporary, skill + 1)
        (temporary / "step").write_text(str(step), encoding="utf-8")  # like all checkpoints, it differs from the others
    return {"number": number, "folder": str(folder), "heldout": _measure(heldout, skill, skill + 1, job.train.beta)}


def _measure(groups: Sequence[TokenGroup], reference: int, policy: int, beta: float) -> dict[str, float]:
    """The metrics of `pairloop.objective.group_metrics`, in plain Python; empty without groups.

    The loss is DPO's on groups whose rewards differ, and the likelihood of the rest.
    """
    if not groups:
        return {}
    found = [_of_group(group, reference, policy) for group in groups]
    compared = [one for one in found if "d_rejected" in one]
    h = [one["d_chosen"] - one["d_rejected"] for one in compared]
    d_chosen = fmean(one.get("d_chosen", 0.0) for one in found)
    d_rejected = sum(one["d_rejected"] for one in compared) / len(found)
    losses = [math.log1p(math.exp(-beta * value)) for value in h]
    metrics = {
        "loss": fmean([*losses, *(one["nll_chosen"] for one in found if "d_rejected" not in one)]),
        "reward_chosen": beta * d_chosen,
        "reward_rejected": beta * d_rejected,
        "margin": beta * sum(h) / len(found),
        "accuracy": sum(0.5 + 0.5 * ((value > 0) - (value < 0)) for value in h) / len(found),
        "usable": len(compared) / len(found),
        "d_chosen": d_chosen,
        "d_rejected": d_rejected,
        "d_chosen_per_token": fmean(one.get("d_chosen_per_token", 0.0) for one in found),
        "nll_chosen": fmean(one["nll_chosen"] for one in found),
        "kl": sum(one["k3"] for one in found) / sum(len(group.completions) for group in groups),
        "n": float(len(groups)),
        "compared": float(len(compared)),
    }
    sampled = [d for group, one in zip(groups, found, strict=True) for d in one["d"] if not group.is_demonstration]
    w = [math.exp(value) for value in sampled]
    ess = {"ess": sum(w) ** 2 / (len(w) * sum(value**2 for value in w))} if w else {}
    return defined(metrics, groups) | ess | ({"pair_loss": fmean(losses)} if losses else {})


def _of_group(group: TokenGroup, reference: int, policy: int) -> dict[str, Any]:
    """Means over the group's better answers, and over its worse ones where it has both; see `group_metrics`."""
    new = [fake.token_logps(side.token_ids, policy) for side in group.completions]
    old = [fake.token_logps(side.token_ids, reference) for side in group.completions]
    d = [sum(n) - sum(o) for n, o in zip(new, old, strict=True)]
    mean = 0.0 if len(d) == 1 else fmean(group.rewards)
    better = [i for i, reward in enumerate(group.rewards) if reward > mean]
    worse = [i for i, reward in enumerate(group.rewards) if reward < mean]
    found: dict[str, Any] = {
        "d": d,
        "k3": sum(math.expm1(a - b) - (a - b) for n, o in zip(new, old, strict=True) for a, b in zip(n, o, strict=True)),
        "nll_chosen": fmean(-sum(new[i]) / len(new[i]) for i in better) if better else 0.0,
    }
    if better:
        found["d_chosen"] = fmean(d[i] for i in better)
        found["d_chosen_per_token"] = fmean(d[i] / len(new[i]) for i in better)
    if better and worse:
        found["d_rejected"] = fmean(d[i] for i in worse)
    return found
