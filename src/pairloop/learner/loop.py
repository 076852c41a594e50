"""One optimizer loop over preference pairs, blind to the objective: from the parent's weights to the new version's."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from pairloop.errors import ConfigError
from pairloop.formats.snapshot import HELDOUT_FILE
from pairloop.learner import checkpoint, reference
from pairloop.learner.checkpoint import State, Weights, trained
from pairloop.learner.controller import RoundController, Stop
from pairloop.learner.data import Limits, TokenGroup, epoch_batches, fingerprint, read_split, tokenize
from pairloop.learner.export import export
from pairloop.learner.job import TrainJob, TrainResult, TrainStatus, nothing_to_train, rewind_metrics
from pairloop.learner.metrics import MetricsFile, libraries
from pairloop.learner.scores import GroupLogps, References, batch_of, padded, precision, score
from pairloop.learner.step import Trainer, is_finite, learning_rate, objective_settings, optimizer_of
from pairloop.learner.supervise import CheckpointMismatch, Diverged
from pairloop.objective import OBJECTIVES
from pairloop.policy.scoring import LoraSettings, load_causal_lm, max_context, resolve_device, vocab_size
from pairloop.template import ChatTemplate
from pairloop.types import PreferencePair

LOG = logging.getLogger(__name__)

Report = Callable[[Mapping[str, Any]], None]

HELDOUT_PAIRS = 128
"""The newest held-out pairs that a look during training scores."""
MAX_SKIPPED_IN_A_ROW = 3


@dataclass(frozen=True, slots=True)
class Data:
    """The usable pairs as token ids, and reason → count of the train pairs that are not used."""

    train: list[TokenGroup]
    heldout: list[TokenGroup]
    dropped: Counter[str]


def train_model(job: TrainJob, pairs: Sequence[PreferencePair], report: Report) -> TrainResult:
    """Train the parent on ``pairs``, from the last checkpoint on, and write the new version to ``job.out_dir``."""
    started_s = time.monotonic()
    settings = job.train
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    model, device = load_parent(job)
    data = _data(job, pairs, model)
    if len(data.train) < settings.min_pairs:
        return nothing_to_train(len(data.train), data.dropped)
    mark = _fingerprint(job, data)
    with precision(device, job.dtype, job.method):
        references, checked = _references(job, model, data, mark)
        parameters = list(trained(model).values())
        trainer = Trainer(model, optimizer_of(parameters, settings), parameters, references, settings)
        state, best = _resume(job, trainer, mark)
        resumed_from = state.step
        clock = _Clock(state.cpu_s, state.wall_s, started_s)
        batches = _batches(job, data)
        passes = _Passes(job, trainer, data, batches, state, clock, best)
        stop = passes.run(report)
        after = measure(job, data.heldout, score(model, data.heldout, micro_batch_size=settings.micro_batch_size), references)
    export(job, model)
    before = measure(job, data.heldout, [references.reference[pair.group_id] for pair in data.heldout], references)
    return TrainResult(
        TrainStatus.SUCCEEDED,
        steps=state.step,
        steps_planned=len(batches),
        pairs=len(data.train),
        metrics=_summary(state),
        reference=checked,
        dropped=dict(data.dropped),
        heldout_before=before,
        heldout_after=after,
        skipped_steps=state.skipped,
        stopped_because=stop.reason,
        stop_message=stop.message,
        weights_step=state.step if stop.best_step is None else stop.best_step,
        warnings=passes.controller.warnings,
        resumed_from=resumed_from,
        libraries=libraries(),
        cpu_s=clock.cpu_s(),
        wall_s=clock.wall_s(),
    )


def load_parent(job: TrainJob) -> tuple[nn.Module, torch.device]:
    """The parent's module, ready to be trained (dropout off), and its device."""
    device = resolve_device(job.device)
    lora = LoraSettings(job.lora_rank, job.lora_alpha, job.lora_targets) if job.method == "lora" else None
    model = load_causal_lm(
        Path(job.base_dir),
        Path(job.parent_path) if job.parent_path else None,
        job.parent_kind,
        # Full fine-tuning keeps float32 weights, see `precision`.
        dtype="float32" if lora is None else job.dtype,
        device=device,
        trainable=True,
        lora=lora,
    )
    return model, device


def measure(
    job: TrainJob, pairs: Sequence[TokenGroup], logps: Sequence[GroupLogps], references: References
) -> dict[str, float]:
    """The objective's metrics of held-out pairs from their log-probs.

    Also ``pair_loss``: -log sigmoid(beta h), whatever the objective; ``likelier``: how often the chosen answer is the likelier.
    """
    if not pairs:
        return {}
    width = max(len(logp_T) for pair in logps for logp_T in pair)
    ones = [tuple(torch.ones_like(logp_T) for logp_T in pair) for pair in logps]
    batch = batch_of(pairs, padded(logps, 2, width), padded(ones, 2, width).bool(), references)
    _, metrics = OBJECTIVES[job.train.objective](batch, objective_settings(job.train))
    summed_BG = batch.logp_BGT.sum(-1)
    d_BG = summed_BG - batch.ref_logp_BGT.sum(-1)
    found = metrics | {
        "pair_loss": -logsigmoid(job.train.beta * (d_BG[:, 0] - d_BG[:, 1])).mean(),
        "likelier": (summed_BG[:, 0] > summed_BG[:, 1]).double().mean(),
    }
    return {name: float(value) for name, value in found.items()} | {"n": float(len(pairs))}


class _Passes:
    """The steps of a round up to where its controller stops it."""

    def __init__(
        self,
        job: TrainJob,
        trainer: Trainer,
        data: Data,
        batches: Sequence[Sequence[int]],
        state: State,
        clock: _Clock,
        best: Weights | None,
    ) -> None:
        self._job, self._trainer, self._data, self._batches = job, trainer, data, batches
        self._state, self._clock, self._best = state, clock, best
        self.controller = RoundController(job.train, state.controller)

    def run(self, report: Report) -> Stop:
        """The steps after ``state.step``; leaves the weights that are to be taken in the model. Raises Diverged."""
        rewind_metrics(Path(self._job.metrics_path), self._state.step)
        with MetricsFile(Path(self._job.metrics_path), report) as metrics:
            # The first look is at the parent: it is what the first rise is a rise from.
            if self._state.step == 0 and self._looks:
                self.controller.after_heldout(self._look())
            stop = None
            while stop is None:
                stop = self._step(metrics)
        if stop.best_step is not None and self._best is not None:
            checkpoint.put_back(self._trainer.model, self._best)
        return stop

    def _step(self, metrics: MetricsFile) -> Stop | None:
        """One step, with the look and the checkpoint that are due after it."""
        state, settings, of = self._state, self._job.train, len(self._batches)
        batch = [self._data.train[i] for i in self._batches[state.step]]
        row = self._trainer.step(batch, learning_rate(state.step + 1, of, settings))
        state.step += 1
        state.last = {"step": state.step, "of": of, **row}
        metrics.write(state.last)
        _count(state, row)
        stop = self.controller.after_step(state.last)
        if stop is None and self._looks:
            found = self._look()
            metrics.write({"step": state.step, "of": of, "heldout": found})
            stop = self.controller.after_heldout(found)
            if self.controller.keeps_best:
                self._best = checkpoint.kept(self._trainer.model)
        if stop is None and state.step % settings.checkpoint_every == 0:
            self._save()
        return stop

    @property
    def _looks(self) -> bool:
        return bool(self._data.heldout) and self.controller.is_due

    def _look(self) -> dict[str, float]:
        """The metrics of the newest held-out pairs as the policy stands."""
        pairs, references = self._data.heldout[-HELDOUT_PAIRS:], self._trainer.references
        logps = score(self._trainer.model, pairs, micro_batch_size=self._job.train.micro_batch_size)
        return measure(self._job, pairs, logps, references)

    def _save(self) -> None:
        state = self._state
        state.cpu_s, state.wall_s, state.controller = self._clock.cpu_s(), self._clock.wall_s(), self.controller.state
        checkpoint.save(Path(self._job.checkpoint_dir), self._trainer.model, self._trainer.optimizer, state, self._best)


def _count(state: State, row: dict[str, float]) -> None:
    """Note the step's effective sample size, or that it was skipped; Diverged at the third skip in a row."""
    if is_finite(row):
        state.skipped_in_a_row = 0
        state.ess.append(row["ess"])
        return
    state.skipped += 1
    state.skipped_in_a_row += 1
    LOG.warning("step %d skipped: loss %s, gradient norm %s", state.step, row["loss"], row["grad_norm"])
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise Diverged(
            f"loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row (up to step {state.step}): "
            'lower train.learning_rate, or use policy.dtype = "float32"'
        )


def _data(job: TrainJob, pairs: Sequence[PreferencePair], model: nn.Module) -> Data:
    """The snapshot's pairs as the model reads them."""
    bounds = [bound for bound in (job.train.max_length, job.max_context, max_context(model)) if bound]
    limits = Limits(min(bounds), vocab_size(model))
    tokens = ChatTemplate.load(Path(job.base_dir))
    train, dropped = tokenize(pairs, tokens, limits, parent_version=job.parent_version)
    others = read_split(Path(job.snapshot_dir), HELDOUT_FILE)
    heldout, _ = tokenize(others, tokens, limits, parent_version=job.parent_version)
    return Data(train, heldout, dropped)


def _references(job: TrainJob, model: nn.Module, data: Data, mark: str) -> tuple[References, dict[str, Any]]:
    """The cached references of an earlier attempt, or new ones; ``model`` is still the parent."""
    folder = Path(job.checkpoint_dir)
    found = reference.load(folder, mark)
    if found is not None:
        return found
    _refuse_unweighable(job, data.train)
    references, report = reference.prepare(model, [*data.train, *data.heldout], job.train, job.dtype)
    if report["passed"] is False:
        LOG.warning("the recorded log-probs are not the model's: %s; the parent scores all pairs", report)
    reference.save(folder, references, report, mark)
    return references, report


def _refuse_unweighable(job: TrainJob, groups: Sequence[TokenGroup]) -> None:
    """ConfigError where importance weights are asked for and nothing says what sampled the pairs."""
    if job.train.importance != "none" and not any(group.is_recorded for group in groups):
        raise ConfigError(
            f'train.importance = "{job.train.importance}" weighs pairs by policy over sampler, but none of these came with the '
            'log-probs that were recorded when it was sampled, as imported pairs do not; set it to "none"'
        )


def _resume(job: TrainJob, trainer: Trainer, mark: str) -> tuple[State, Weights | None]:
    """The last checkpoint's state and best weights, the rest put into model and optimizer; a new state without a checkpoint.

    Raises CheckpointMismatch.
    """
    found = checkpoint.load(Path(job.checkpoint_dir), trainer.model, trainer.optimizer)
    if found is None:
        return State(mark), None
    if found[0].fingerprint != mark:
        raise CheckpointMismatch(
            f"{job.checkpoint_dir}: the checkpoint belongs to other pairs, another model or other settings; "
            "resume with the ones it was begun with, or remove the folder and start afresh"
        )
    LOG.info("resuming after step %d", found[0].step)
    return found


def _batches(job: TrainJob, data: Data) -> list[list[int]]:
    settings = job.train
    return [
        batch
        for epoch in range(settings.epochs)
        for batch in epoch_batches(len(data.train), settings.batch_size, seed=settings.seed, epoch=epoch)
    ]


def _fingerprint(job: TrainJob, data: Data) -> str:
    """A hash of what a resumed run must share with the one it goes on from: settings, pairs, and the parent's files."""
    files = [
        (path.name, path.stat().st_size)
        for folder in (job.base_dir, job.parent_path)
        if folder
        for path in sorted(Path(folder).iterdir())
    ]
    parts = [json.dumps(job.recipe(), sort_keys=True), repr(files), fingerprint(data.train), fingerprint(data.heldout)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _summary(state: State) -> dict[str, float]:
    last = {name: value for name, value in state.last.items() if isinstance(value, float)}
    return last | ({"ess_mean": fmean(state.ess), "ess_min": min(state.ess)} if state.ess else {})


@dataclass(frozen=True, slots=True)
class _Clock:
    """Seconds over all attempts: those up to the checkpoint, and this process's."""

    earlier_cpu_s: float
    earlier_wall_s: float
    started_s: float

    def cpu_s(self) -> float:
        return self.earlier_cpu_s + time.process_time()

    def wall_s(self) -> float:
        return self.earlier_wall_s + time.monotonic() - self.started_s
