"""One optimizer loop over groups, blind to the objective: from the parent's weights to the new version's."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from pairloop.errors import ConfigError
from pairloop.formats.snapshot import HELDOUT_FILE
from pairloop.learner import checkpoint, reference
from pairloop.learner.checkpoint import State, Weights, trained, whole_weights
from pairloop.learner.controller import RoundController
from pairloop.learner.data import Limits, TokenGroup, epoch_batches, fingerprint, read_split, refuse_unfit, tokenize
from pairloop.learner.export import export
from pairloop.learner.halt import put_off_sigterm
from pairloop.learner.job import TrainJob, TrainResult, TrainStatus, nothing_to_train, rewind_metrics
from pairloop.learner.measure import measure
from pairloop.learner.memory import TokenBudget, checkpoint_layers
from pairloop.learner.metrics import MetricsFile, libraries
from pairloop.learner.passes import Passes
from pairloop.learner.scores import References, group_logps, precision, score
from pairloop.learner.sharding import shard
from pairloop.learner.step import Trainer, is_finite, optimizer_of
from pairloop.learner.supervise import CheckpointMismatch, Diverged
from pairloop.learner.workers import ALONE, WorkerLost, Workers
from pairloop.policy.packed import use_flex
from pairloop.policy.scoring import LoraSettings, bare, load_causal_lm, max_context, resolve_device, vocab_size
from pairloop.template import ChatTemplate
from pairloop.types import TrainingRow

LOG = logging.getLogger(__name__)

Report = Callable[[Mapping[str, Any]], None]

HELDOUT_ROWS = 128
"""The newest held-out rows that a look during training scores."""
MAX_SKIPPED_IN_A_ROW = 3


@dataclass(frozen=True, slots=True)
class Data:
    """The usable rows as token ids, and reason → count of the train rows that are not used."""

    train: list[TokenGroup]
    heldout: list[TokenGroup]
    dropped: Counter[str]


def train_model(job: TrainJob, rows: Sequence[TrainingRow], report: Report, workers: Workers = ALONE) -> TrainResult:
    """Train the parent on ``rows``, from the last checkpoint on, and write the new version to ``job.out_dir``.

    Every worker calls it, ends with the same result, and the leading one writes.
    """
    started_s = time.monotonic()
    settings = job.train
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    # What is to be divided is read into the machine's memory, as no worker's device need hold it.
    model, device = load_parent(job, torch.device("cpu") if workers.sharded else None)
    data = _data(job, rows, model)
    if len(data.train) < settings.min_pairs:
        return nothing_to_train(len(data.train), data.dropped)
    mark = _fingerprint(job, data)
    workers.agree(list(trained(model).values()))
    scorer = shard(model, device, group_logps) if workers.sharded else model
    with precision(model, job.dtype):
        # Divided, a pass that ran out of memory cannot be made again: the others are in the middle of it.
        budget = TokenBudget(settings.max_tokens_per_batch, may_halve=not workers.sharded)
        references, checked = _references(job, scorer, data, mark, budget, workers)
        parameters = list(trained(model).values())
        trainer = Trainer(scorer, optimizer_of(parameters, settings), parameters, references, settings, budget, workers)
        state, best = _resume(job, model, trainer, mark)
        resumed_from = state.step
        clock = _Clock(state.cpu_s, state.wall_s, started_s, workers)
        passes = _run(job, model, trainer, data, state, best, clock, report)
        after = measure(settings, data.heldout, score(scorer, data.heldout, budget, workers), references)
    stop = passes.stop
    assert stop is not None
    _export(job, model, workers, Path(job.out_dir), is_last=True)
    before = measure(settings, data.heldout, [references.reference[group.group_id] for group in data.heldout], references)
    return TrainResult(
        TrainStatus.SUCCEEDED,
        steps=state.step,
        steps_planned=state.last["of"],
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
        warnings=[*passes.controller.warnings, *([budget.warning] if budget.warning else [])],
        resumed_from=resumed_from,
        libraries=libraries(),
        processes=workers.size,
        trained_tokens=state.tokens,
        cpu_s=clock.cpu_s(),
        wall_s=clock.wall_s(),
    )


def load_parent(job: TrainJob, read_to: torch.device | None = None) -> tuple[nn.Module, torch.device]:
    """The parent's module, ready to be trained (dropout off), and the job's device, where it is unless read elsewhere."""
    device = resolve_device(job.device)
    lora = LoraSettings(job.lora_rank, job.lora_alpha, job.lora_targets) if job.method == "lora" else None
    model = load_causal_lm(
        Path(job.base_dir),
        Path(job.parent_path) if job.parent_path else None,
        job.parent_kind,
        # Full fine-tuning keeps float32 weights, see `precision`.
        dtype="float32" if lora is None else job.dtype,
        device=read_to or device,
        trainable=True,
        lora=lora,
        quantization=job.quantization,
    )
    if job.train.attention == "flex":
        if device.type != "cuda":
            raise ConfigError(
                'train.attention = "flex" needs CUDA: FlexAttention has no backward pass on the CPU; set it to "sdpa"'
            )
        use_flex(bare(model))
    if job.train.gradient_checkpointing:
        checkpoint_layers(model)
    return model, device


def _export(job: TrainJob, model: nn.Module, workers: Workers, target: Path, *, is_last: bool) -> None:
    """Write the model as it stands; divided weights go into the parent, read once more, that it is written as any other.

    So do those that are rounded for it, as long as the training goes on with the exact ones.
    """
    is_rounded = job.method == "full" and job.dtype != "float32"
    apart = workers.sharded or (is_rounded and not is_last)
    weights = whole_weights(model, workers) if apart else None
    if not workers.leads:
        return
    if weights is not None:
        model, _ = load_parent(job, torch.device("cpu"))
        checkpoint.put_back(model, weights)
    export(job, model, target)


def _run(
    job: TrainJob,
    model: nn.Module,
    trainer: Trainer,
    data: Data,
    state: State,
    best: Weights | None,
    clock: _Clock,
    report: Report,
) -> Passes:
    """The steps after ``state.step``, with metrics rows and checkpoints; leaves the weights to be taken. Raises Diverged.

    SIGTERM ends the process after the step, with a checkpoint.
    """
    workers = trainer.workers
    batches, epoch_ends = _batches(job, data)

    def look(groups: Sequence[TokenGroup]) -> dict[str, float]:
        logps = score(trainer.model, groups, trainer.budget, workers)
        return measure(job.train, groups, logps, trainer.references)

    def keep(epoch: int) -> dict[str, Any]:
        folder = Path(job.epochs_dir, f"step-{state.step:08d}")
        _export(job, model, workers, folder, is_last=False)
        return {"number": epoch, "folder": str(folder), "heldout": look(data.heldout) if data.heldout else {}}

    controller = RoundController(job.train, state.controller)
    newest = data.heldout[-HELDOUT_ROWS:]
    passes = Passes(model, job.train, controller, trainer.step, (lambda: look(newest)) if newest else None, best)
    if workers.leads:
        rewind_metrics(Path(job.metrics_path), state.step)
    path = Path(job.metrics_path if workers.leads else os.devnull)
    with put_off_sigterm() as asked_to_stop, MetricsFile(path, report) as metrics:
        for rows in passes.run(batches, state.step):
            _note(state, trainer, rows)
            for row in rows:
                metrics.write(row)
            _count(state, state.last)
            stop = passes.stop
            if job.epochs_dir and state.step in epoch_ends and (stop is None or stop.best_step is None):
                metrics.write({"step": state.step, "of": len(batches), "epoch": keep(epoch_ends.index(state.step) + 1)})
            is_stopping = any(workers.gather(asked_to_stop()))
            if stop is None and (is_stopping or state.step % job.train.checkpoint_every == 0):
                state.cpu_s, state.wall_s, state.controller = clock.cpu_s(), clock.wall_s(), controller.state
                checkpoint.save(Path(job.checkpoint_dir), model, trainer.optimizer, state, passes.best, workers)
            if stop is None and is_stopping:
                LOG.info("stopping after step %d, from where the run goes on", state.step)
                break
    if passes.stop is None:
        raise WorkerLost("another worker was asked to end")
    return passes


def _note(state: State, trainer: Trainer, rows: list[Mapping[str, Any]]) -> None:
    """Count the step whose rows these are, and tell of a budget that was lowered."""
    state.last, state.step = dict(rows[0]), state.step + 1
    state.tokens += int(rows[0]["tokens"])
    if trainer.budget.warning and not state.budget.get("warning"):
        rows[0] = {**rows[0], "warning": trainer.budget.warning}
    state.budget = asdict(trainer.budget)


def _count(state: State, row: dict[str, float]) -> None:
    """Note the step's effective sample size, or that it was skipped; Diverged at the third skip in a row."""
    if is_finite(row):
        state.skipped_in_a_row = 0
        if "ess" in row:
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


def _data(job: TrainJob, rows: Sequence[TrainingRow], model: nn.Module) -> Data:
    """The snapshot's rows as the model reads them. Raises UnfitRows."""
    bounds = [bound for bound in (job.train.max_length, job.max_context, max_context(model)) if bound]
    limits = Limits(min(bounds), vocab_size(model))
    tokens = ChatTemplate.load(Path(job.base_dir))

    def encoded(rows: Sequence[TrainingRow]) -> tuple[list[TokenGroup], Counter[str]]:
        return tokenize(rows, tokens, limits, parent_version=job.parent_version, objective=job.train.objective)

    others = read_split(Path(job.snapshot_dir), HELDOUT_FILE)
    refuse_unfit(others, job.train.objective)
    train, dropped = encoded(rows)
    return Data(train, encoded(others)[0], dropped)


def _references(
    job: TrainJob, model: nn.Module, data: Data, mark: str, budget: TokenBudget, workers: Workers
) -> tuple[References, dict[str, Any]]:
    """The cached references of an earlier attempt, or new ones; ``model`` is still the parent."""
    folder = Path(job.checkpoint_dir)
    found = workers.broadcast(reference.load(folder, mark) if workers.leads else None)
    if found is not None:
        budget.resume(found[1]["budget"])
        return found
    _refuse_unweighable(job, data.train)
    groups = [*data.train, *data.heldout]
    references, report = reference.prepare(model, groups, job.train, job.dtype, budget, workers)
    report["budget"] = asdict(budget)
    if report["passed"] is False:
        LOG.warning("the recorded log-probs are not the model's: %s; the parent scores all rows", report)
    if workers.leads:
        reference.save(folder, references, report, mark)
    return references, report


def _refuse_unweighable(job: TrainJob, groups: Sequence[TokenGroup]) -> None:
    """ConfigError where importance weights are asked for and nothing says what sampled the pairs."""
    if job.train.importance != "none" and not any(group.is_recorded for group in groups):
        raise ConfigError(
            f'train.importance = "{job.train.importance}" weighs rows by policy over sampler, but none of these came with the '
            'log-probs that were recorded when it was sampled, as imported rows do not; set it to "none"'
        )


def _resume(job: TrainJob, model: nn.Module, trainer: Trainer, mark: str) -> tuple[State, Weights | None]:
    """The last checkpoint's state and best weights, the rest put into model and optimizer; a new state without a checkpoint.

    Raises CheckpointMismatch.
    """
    found = checkpoint.load(Path(job.checkpoint_dir), model, trainer.optimizer, trainer.workers)
    if found is None:
        return State(mark), None
    if found[0].fingerprint != mark:
        raise CheckpointMismatch(
            f"{job.checkpoint_dir}: the checkpoint belongs to other data, another model or other settings; "
            "resume with the ones it was begun with, or remove the folder and start afresh"
        )
    LOG.info("resuming after step %d", found[0].step)
    trainer.budget.resume(found[0].budget)
    return found


def _batches(job: TrainJob, data: Data) -> tuple[list[list[TokenGroup]], list[int]]:
    """The groups of each step, and the last step of each epoch."""
    settings = job.train
    batches: list[list[TokenGroup]] = []
    ends = []
    for epoch in range(settings.epochs):
        parts = epoch_batches(len(data.train), settings.batch_size, seed=settings.seed, epoch=epoch)
        batches += [[data.train[i] for i in part] for part in parts]
        ends.append(len(batches))
    return batches, ends


def _fingerprint(job: TrainJob, data: Data) -> str:
    """A hash of what a resumed run must share with the one it goes on from: settings, pairs, and the parent's files."""
    files = [
        (path.name, path.stat().st_size)
        for folder in (job.base_dir, job.parent_path)
        if folder
        for path in sorted(Path(folder).iterdir())
    ]
    recipe = job.recipe()
    # Of one value to all but rounding: a run that died for want of memory may go on with less.
    for name in ("max_tokens_per_batch", "gradient_checkpointing"):
        del recipe["train"][name]
    parts = [json.dumps(recipe, sort_keys=True), repr(files), fingerprint(data.train), fingerprint(data.heldout)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _summary(state: State) -> dict[str, float]:
    last = {name: value for name, value in state.last.items() if isinstance(value, float)}
    return last | ({"ess_mean": fmean(state.ess), "ess_min": min(state.ess)} if state.ess else {})


@dataclass(frozen=True, slots=True)
class _Clock:
    """Seconds over all attempts: those up to the checkpoint, and this one's; of CPU, all workers' together."""

    earlier_cpu_s: float
    earlier_wall_s: float
    started_s: float
    workers: Workers

    def cpu_s(self) -> float:
        return self.earlier_cpu_s + sum(self.workers.gather(time.process_time()))

    def wall_s(self) -> float:
        return self.earlier_wall_s + time.monotonic() - self.started_s
