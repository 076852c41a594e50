"""One optimizer step: micro batches, accumulated gradients, clipping, and the guard against what is not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pairloop.config import TrainSection
from pairloop.learner.batches import MicroBatch
from pairloop.learner.data import TokenGroup
from pairloop.learner.memory import TokenBudget
from pairloop.learner.metrics import defined
from pairloop.learner.scores import References, batch_of, group_logps, totals_of
from pairloop.learner.sharding import whole
from pairloop.learner.workers import ALONE, Workers
from pairloop.objective import OBJECTIVES, Batch, Objective, ObjectiveSettings, Totals, effective_sample_size, log_weights

MAX_KL_WEIGHT = 2.0
"""Bound on the importance weights of `kl_reference`."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """What every step needs and none changes but the model, the optimizer and, where memory runs out, the budget.

    Each of the ``workers`` is given the whole batch, takes its share of it, and ends with the same gradient and metrics.
    """

    model: nn.Module
    optimizer: Optimizer
    parameters: Sequence[nn.Parameter]
    references: References
    settings: TrainSection
    budget: TokenBudget
    workers: Workers = ALONE

    def step(self, groups: Sequence[TokenGroup], lr: float) -> dict[str, float]:
        """Train on one batch; its metrics before the step, with ``grad_norm`` before clipping.

        Where loss or gradient is not finite, weights and optimizer stay as they are (see `is_finite`).
        """
        started_s = time.monotonic()
        totals, mine = totals_of(groups), self.workers.share(groups)
        z0 = self._kl_reference(mine, totals, groups[:1]) if self._objective.wants_kl_reference else None
        metrics, drift = self.budget.run(self.model, mine, lambda parts: self._accumulate(parts, totals, z0, groups[:1]))
        self.budget.agree(self.workers)
        # What is not a sum over completions does not add up: it is taken of all micro batches together.
        metrics = self.workers.sum_metrics(metrics)
        metrics.pop("ess", None)
        metrics |= drift.of_all(self.workers).metrics()
        self.workers.sum_gradients(self.parameters)
        norm = clip(self.parameters, self.settings.clip_norm)
        found = defined({name: float(value) for name, value in metrics.items()}, groups) | {"grad_norm": norm, "lr": lr}
        if is_finite(found):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        tokens = sum(group.n_tokens for group in groups)
        rate = tokens / (time.monotonic() - started_s)
        return found | {"tokens": tokens, "tokens_per_s": rate, "max_tokens_per_batch": self.budget.tokens}

    @property
    def _objective(self) -> Objective:
        return OBJECTIVES[self.settings.objective]

    def _kl_reference(self, groups: Sequence[TokenGroup], totals: Totals, filler: Sequence[TokenGroup]) -> Tensor:
        def work(parts: list[MicroBatch]) -> Tensor:
            return kl_reference(self.model, parts, self.references, totals, self.workers, filler)

        return self.budget.run(self.model, groups, work)

    def _accumulate(
        self, parts: Sequence[MicroBatch], totals: Totals, z0: Tensor | None, filler: Sequence[TokenGroup]
    ) -> tuple[dict[str, Tensor], Drift]:
        """Gradient and metrics of this worker's part of the batch: sums over the batch's totals, so they add up.

        ``filler``: what is read where other workers have more micro batches to read, see `Workers.idle_passes`.
        """
        self.optimizer.zero_grad(set_to_none=True)
        settings = objective_settings(self.settings)
        idle = self.workers.idle_passes(len(parts))
        metrics: dict[str, Tensor] = {}
        drift = Drift()
        for part in parts:
            batch = batch_of(part.groups, *group_logps(self.model, part.groups), self.references, totals)
            loss, of_part = self._objective(replace(batch, kl_reference=z0), settings)
            (loss * self.workers.loss_factor).backward()  # type: ignore[no-untyped-call]
            for name, value in of_part.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + value
            drift.add(batch, part.groups)
        for _ in range(idle):
            (group_logps(self.model, filler)[0].sum() * 0).backward()  # type: ignore[no-untyped-call]
        return metrics, drift


class Drift:
    """How far the policy has moved from what sampled the batch: importance weights of its completions, part by part.

    Length and entropy under the policy need no new samples: with w = policy / sampler of each completion, self-normalised
    (sum w L / sum w, and sum w (-log policy) / sum w) they are those of the policy's own answers, with a variance that grows
    as the effective sample size falls. On completions that were trained on before (a second pass) they say what the policy
    learned of these, not of others.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def of_all(self, workers: Workers) -> Drift:
        """That of all workers' parts."""
        drift = Drift()
        for parts in workers.gather([(log_w.cpu(), logp.cpu(), length.cpu()) for log_w, logp, length in self._parts]):
            drift._parts += parts
        return drift

    def add(self, batch: Batch, groups: Sequence[TokenGroup] = ()) -> None:
        """Note a part of the batch, but for the demonstrations among its ``groups``, which no policy sampled."""
        present_BG = batch.present_BG
        for b, group in enumerate(groups):
            present_BG[b] &= not group.is_demonstration
        if not present_BG.any():
            return
        logp_BGT = torch.where(batch.mask_BGT, batch.logp_BGT.detach(), torch.zeros_like(batch.logp_BGT))
        values = (log_weights(batch).sum(-1), logp_BGT.sum(-1), batch.length_BG)
        log_w_N, logp_N, length_N = (value_BG[present_BG].double() for value_BG in values)
        self._parts.append((log_w_N, logp_N, length_N))

    def metrics(self) -> dict[str, Tensor]:
        """``ess``; ``length_ratio`` and ``entropy_ratio``: tokens and nats per answer of the policy over the sampler's.

        Nothing where there was nothing to note.
        """
        if not self._parts:
            return {}
        log_w_N, logp_N, length_N = (torch.cat(values) for values in zip(*self._parts, strict=True))
        w_N = torch.softmax(log_w_N, 0)
        return {
            "ess": effective_sample_size(log_w_N),
            "length_ratio": (w_N * length_N).sum() / length_N.mean(),
            "entropy_ratio": (w_N * -logp_N).sum() / (log_w_N - logp_N).mean(),
        }


@torch.no_grad()
def kl_reference(
    model: nn.Module,
    parts: Sequence[MicroBatch],
    references: References,
    totals: Totals,
    workers: Workers = ALONE,
    filler: Sequence[TokenGroup] = (),
) -> Tensor:
    """KTO's z0 of an optimizer batch: max(0, mean of w log w) over its completions, w = min(policy / reference, 2).

    An importance-weighted estimate of KL(policy || reference) in nats per completion from the round's own completions; costs a
    scoring pass. The paper (2402.01306, eq. 8) averages log(policy / reference) of mismatched completions instead, which are
    neither's samples. The bound on w keeps one completion from deciding for all. ``parts``: this worker's; ``filler``: read
    where others have more of them.
    """
    idle = workers.idle_passes(len(parts))
    total = torch.zeros(())
    for part in parts:
        batch = batch_of(part.groups, *group_logps(model, part.groups), references, totals)
        delta_BGT = torch.where(batch.mask_BGT, batch.logp_BGT - batch.ref_logp_BGT, torch.zeros_like(batch.logp_BGT))
        log_w_BG = delta_BGT.sum(-1).clamp(max=math.log(MAX_KL_WEIGHT))
        total = total.to(log_w_BG) + (log_w_BG.exp() * log_w_BG * batch.weight_B[:, None]).sum()
    for _ in range(idle):
        group_logps(model, filler)
    return (sum(workers.gather(total.cpu()), torch.zeros(())) / totals.completions).clamp(min=0.0)


def clip(parameters: Sequence[nn.Parameter], largest: float) -> float:
    """Scale the gradients to a norm of at most ``largest`` over all parameters; the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return float(norm)


def is_finite(metrics: dict[str, float]) -> bool:
    """True where the step may be taken."""
    return all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm"))


def objective_settings(settings: TrainSection) -> ObjectiveSettings:
    """The keys of the section that the objectives know, which have the same names there."""
    return ObjectiveSettings(**{field.name: getattr(settings, field.name) for field in fields(ObjectiveSettings)})


def optimizer_of(parameters: Sequence[nn.Parameter], settings: TrainSection) -> AdamW:
    """A fresh AdamW (Loshchilov and Hutter 2019); weight decay on matrices only."""
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_eps,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def learning_rate(step: int, steps: int, settings: TrainSection) -> float:
    """The rate of step 1..steps: a linear rise over the warm-up (at most half the run), then linear to the final share."""
    warmup = min(settings.warmup_steps, steps // 2)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    done = (step - warmup) / (steps - warmup)
    return settings.learning_rate * (1 - (1 - settings.final_lr_share) * done)
