"""One optimizer step: micro batches, accumulated gradients, clipping, and the guard against what is not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pairloop.config import TrainSection
from pairloop.learner.data import TokenPair, micro_batches
from pairloop.learner.scores import References, batch_of, pair_logps
from pairloop.objective import OBJECTIVES, ObjectiveSettings, effective_sample_size, log_weights


@dataclass(frozen=True, slots=True)
class Trainer:
    """What every step needs and none changes but the model and the optimizer."""

    model: nn.Module
    optimizer: Optimizer
    parameters: Sequence[nn.Parameter]
    references: References
    settings: TrainSection

    def step(self, pairs: Sequence[TokenPair], lr: float) -> dict[str, float]:
        """Train on one batch; its metrics before the step, with ``grad_norm`` before clipping.

        Where loss or gradient is not finite, weights and optimizer stay as they are (see `is_finite`).
        """
        started_s = time.monotonic()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self._accumulate(pairs)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        found = {name: float(value) for name, value in metrics.items()} | {"grad_norm": float(norm), "lr": lr}
        if is_finite(found):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        return found | {"tokens_per_s": sum(pair.n_tokens for pair in pairs) / (time.monotonic() - started_s)}

    def _accumulate(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        """Gradient and metrics of the whole batch, from its micro batches: each counts by the weight of its pairs."""
        objective = OBJECTIVES[self.settings.objective]
        total = sum(pair.weight for pair in pairs)
        metrics: dict[str, Tensor] = {}
        log_w: list[Tensor] = []
        for part in micro_batches(pairs, self.settings.micro_batch_size):
            batch = batch_of(part, *pair_logps(self.model, part), self.references)
            loss, of_part = objective(batch, objective_settings(self.settings))
            share = sum(pair.weight for pair in part) / total
            (loss * share).backward()  # type: ignore[no-untyped-call]
            for name, value in of_part.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + share * value
            log_w.append(log_weights(batch).sum(-1).flatten())
        # A mean over parts is no effective sample size of the whole.
        return metrics | {"ess": effective_sample_size(torch.cat(log_w))}


def is_finite(metrics: dict[str, float]) -> bool:
    """True where the step may be taken."""
    return all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm"))


def objective_settings(settings: TrainSection) -> ObjectiveSettings:
    return ObjectiveSettings(settings.beta, settings.label_smoothing, settings.nll_weight)


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
