"""One optimizer loop over preference pairs, blind to the objective: from the parent's weights to the new version's."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pairloop.config import TrainSection
from pairloop.learner import checkpoint, reference
from pairloop.learner.checkpoint import State, trained
from pairloop.learner.data import HELDOUT_FILE, Limits, TokenPair, epoch_batches, fingerprint, micro_batches, read_split, tokenize
from pairloop.learner.export import export
from pairloop.learner.job import TrainJob, TrainResult, TrainStatus, last_checkpoint, nothing_to_train, rewind_metrics
from pairloop.learner.metrics import MetricsFile, libraries
from pairloop.learner.scores import PairLogps, References, batch_of, padded, pair_logps, precision, score
from pairloop.learner.supervise import CheckpointMismatch, Diverged
from pairloop.objective import OBJECTIVES, Batch, ObjectiveSettings, effective_sample_size, log_weights, pair_metrics
from pairloop.policy.scoring import LoraSettings, load_causal_lm, max_context, resolve_device, vocab_size
from pairloop.template import ChatTemplate
from pairloop.types import PreferencePair

LOG = logging.getLogger(__name__)

ESS_WINDOW = 8
"""Steps whose mean effective sample size decides whether the round stops: one batch alone is too noisy."""
MAX_SKIPPED_IN_A_ROW = 3


@dataclass(frozen=True, slots=True)
class Work:
    """All that a step needs and does not change."""

    job: TrainJob
    model: nn.Module
    device: torch.device
    optimizer: Optimizer
    parameters: list[nn.Parameter]
    pairs: list[TokenPair]
    references: References
    steps: int

    @property
    def settings(self) -> TrainSection:
        return self.job.train

    @property
    def objective(self) -> ObjectiveSettings:
        return ObjectiveSettings(self.settings.beta, self.settings.label_smoothing, self.settings.nll_weight)


def train_model(
    job: TrainJob, pairs: Sequence[PreferencePair], report: Callable[[Mapping[str, Any]], None]
) -> TrainResult:
    """Train the parent on ``pairs`` from the last checkpoint on, and write the new version to ``job.out_dir``."""
    started_s = time.monotonic()
    torch.set_num_threads(job.train.threads)
    torch.manual_seed(job.train.seed)
    model, device = load_parent(job)
    usable, heldout, dropped = _token_pairs(job, pairs, model)
    if len(usable) < job.train.min_pairs:
        return nothing_to_train(len(usable), dropped)
    mark = _fingerprint(job, usable)
    with precision(device, job.dtype, job.method):
        references, checked = _references(job, model, [*usable, *heldout], mark)
        work = Work(job, model, device, _optimizer(model, job.train), list(trained(model).values()), usable, references, _steps(job, usable))
        state = _resume(work, mark)
        resumed_from = state.step
        before = State(mark, cpu_s=state.cpu_s, wall_s=state.wall_s)
        stopped_because = _run(work, state, started_s, before, report)
        after = _heldout(work, heldout, score(model, heldout, micro_batch_size=job.train.micro_batch_size))
    export(job, model)
    return TrainResult(
        TrainStatus.SUCCEEDED,
        steps=state.step,
        steps_planned=work.steps,
        pairs=len(usable),
        metrics={**_numbers(state.last), "ess_mean": fmean(state.ess), "ess_min": min(state.ess)} if state.ess else _numbers(state.last),
        reference=checked,
        dropped=dict(dropped),
        heldout_before=_heldout(work, heldout, [references.reference[pair.pair_id] for pair in heldout]),
        heldout_after=after,
        skipped_steps=state.skipped,
        stopped_because=stopped_because,
        resumed_from=resumed_from,
        libraries=libraries(),
        cpu_s=before.cpu_s + time.process_time(),
        wall_s=before.wall_s + time.monotonic() - started_s,
    )


def load_parent(job: TrainJob) -> tuple[nn.Module, torch.device]:
    """The parent's module, ready to be trained, and its device."""
    device = resolve_device(job.device)
    lora = LoraSettings(job.lora_rank, job.lora_alpha, job.lora_targets) if job.method == "lora" else None
    model = load_causal_lm(
        Path(job.base_dir),
        Path(job.parent_path) if job.parent_path else None,
        job.parent_kind,
        dtype="float32" if lora is None else job.dtype,
        device=device,
        trainable=True,
        lora=lora,
    )
    return model, device
