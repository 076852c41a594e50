"""What the held-out rows say about the policy as it stands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pairloop.config import TrainSection
from pairloop.learner.data import TokenGroup
from pairloop.learner.metrics import defined
from pairloop.learner.scores import GroupLogps, References, batch_of, padded
from pairloop.learner.step import objective_settings
from pairloop.objective import OBJECTIVES, Batch


def measure(
    settings: TrainSection, groups: Sequence[TokenGroup], logps: Sequence[GroupLogps], references: References
) -> dict[str, float]:
    """The objective's metrics of held-out groups from their log-probs, as far as they are defined, and their number ``n``.

    ``compared``: how many have rewards that differ. Of these, over a group's pairs of a better and a worse answer:
    ``pair_loss``, -log sigmoid(beta h) whatever the objective; ``likelier``, how often the better one is the likelier.
    """
    if not groups:
        return {}
    largest, width = max(len(group) for group in logps), max(len(logp_T) for group in logps for logp_T in group)
    ones = [tuple(torch.ones_like(logp_T) for logp_T in group) for group in logps]
    batch = batch_of(groups, padded(logps, largest, width), padded(ones, largest, width).bool(), references)
    _, metrics = OBJECTIVES[settings.objective](batch, objective_settings(settings))
    found = defined({name: float(value) for name, value in metrics.items()}, groups) | {"n": float(len(groups))}
    if all(group.is_demonstration for group in groups):
        found.pop("ess", None)
    return found | _contrasts(batch, settings.beta)


def _contrasts(batch: Batch, beta: float) -> dict[str, float]:
    summed_BG, present_BG = batch.logp_BGT.sum(-1), batch.present_BG
    d_BG = summed_BG - batch.ref_logp_BGT.sum(-1)
    # [b, i, j]: answer i is better than answer j.
    better_BGG = batch.reward_BG[:, :, None] > batch.reward_BG[:, None, :]
    better_BGG &= present_BG[:, :, None] & present_BG[:, None, :]
    is_compared_B = better_BGG.any((1, 2))
    if not is_compared_B.any():
        return {"compared": 0.0}
    loss_BGG = -logsigmoid(beta * (d_BG[:, :, None] - d_BG[:, None, :]))
    likelier_BGG = (summed_BG[:, :, None] > summed_BG[:, None, :]).double()

    def mean(value_BGG: Tensor) -> float:
        of_group_B = (value_BGG * better_BGG).sum((1, 2)) / better_BGG.sum((1, 2)).clamp(min=1)
        return float(of_group_B[is_compared_B].mean())

    return {"compared": float(is_compared_B.sum()), "pair_loss": mean(loss_BGG), "likelier": mean(likelier_BGG)}
