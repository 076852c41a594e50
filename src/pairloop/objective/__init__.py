"""Objectives: pure functions of log-probs, in the papers' words, the equation beside the line.

A batch holds B groups of G completions of at most T tokens each: ``logp_BGT``. One trainer runs them all, blind to which.
A new objective is one function and one line in OBJECTIVES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from pairloop.objective import group, preference
from pairloop.objective.batch import Batch, ObjectiveSettings, Totals, log_weights, totals_of
from pairloop.objective.metrics import Metrics, effective_sample_size, group_metrics, kl_from_sampler


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss and what it asks for: ``objective(batch, settings)`` gives the loss and its `group_metrics`.

    needs_pairs: groups must have two completions (else ValueError). needs_reference: the loss reads the reference's log-probs
    whatever the settings; the group family reads them only where kl_weight > 0. wants_kl_reference: see `Batch.kl_reference`.
    """

    loss: Callable[[Batch, ObjectiveSettings], Tensor]
    needs_pairs: bool = False
    needs_reference: bool = False
    wants_kl_reference: bool = False

    def __call__(self, batch: Batch, settings: ObjectiveSettings) -> tuple[Tensor, Metrics]:
        loss = self.loss(batch, settings)
        return loss, group_metrics(batch, settings, loss)


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "dpo": Objective(preference.dpo, needs_pairs=True, needs_reference=True),
        "cdpo": Objective(preference.cdpo, needs_pairs=True, needs_reference=True),
        "rdpo": Objective(preference.rdpo, needs_pairs=True, needs_reference=True),
        "ipo": Objective(preference.ipo, needs_pairs=True, needs_reference=True),
        "dpo_norm": Objective(preference.dpo_norm, needs_pairs=True, needs_reference=True),
        "ld_dpo": Objective(preference.ld_dpo, needs_pairs=True, needs_reference=True),
        "dpop": Objective(preference.dpop, needs_pairs=True, needs_reference=True),
        "dpo_nll": Objective(preference.dpo_nll, needs_pairs=True, needs_reference=True),
        "simpo": Objective(preference.simpo, needs_pairs=True),
        "orpo": Objective(preference.orpo, needs_pairs=True),
        "kto": Objective(preference.kto, needs_reference=True, wants_kl_reference=True),
        "grpo": Objective(group.grpo),
        "rloo": Objective(group.rloo),
        "dr_grpo": Objective(group.dr_grpo),
        "dapo": Objective(group.dapo),
        "sft": Objective(group.sft),
    }
)

dpo = OBJECTIVES["dpo"]
sft = OBJECTIVES["sft"]

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Metrics",
    "Objective",
    "ObjectiveSettings",
    "Totals",
    "dpo",
    "effective_sample_size",
    "group_metrics",
    "kl_from_sampler",
    "log_weights",
    "sft",
    "totals_of",
]
