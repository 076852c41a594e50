"""Checkpoints from which a killed run goes on to the same bits: trained weights, optimizer state, and where it stood."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pairloop import faults
from pairloop.learner.files import whole_folder
from pairloop.learner.job import last_checkpoint, write_json
from pairloop.learner.sharding import divided, joined_parts, own, whole
from pairloop.learner.workers import ALONE, Workers

WEIGHTS, BEST, OPTIMIZER, STATE = "weights.safetensors", "best.safetensors", "optimizer.safetensors", "state.json"

Weights = Mapping[str, Tensor]


@dataclass(slots=True)
class State:
    """Where a run stands after ``step`` steps; ``controller``: the round controller's state. ``budget``: the
    token budget of a pass. ``tokens``: those of all steps' sequences.

    The order of the rows follows from seed and step, so it is not kept.
    """

    fingerprint: str
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    ess: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    controller: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    cpu_s: float = 0.0
    wall_s: float = 0.0


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name, each once (tied weights have one name)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def kept(model: nn.Module) -> Weights:
    """A copy of the trained weights, in the machine's own memory; of divided ones, this worker's part."""
    return {name: own(parameter.detach()).to("cpu", copy=True) for name, parameter in trained(model).items()}


def put_back(model: nn.Module, weights: Weights) -> None:
    """Make what `kept` gave the trained weights."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            own(parameter).copy_(weights[name])


def save(
    folder: Path, model: nn.Module, optimizer: Optimizer, state: State, best: Weights | None = None, workers: Workers = ALONE
) -> None:
    """Write ``step-<n>`` whole or not at all, and remove the older ones. ``best``: weights that may be taken in the end.

    Every worker calls it, and the leading one writes: whole tensors, from which any number of workers can go on.
    """
    if not (workers.leads or workers.sharded):
        return
    parameters = trained(model)
    moments = {
        f"{index}.{name}": value for index, values in optimizer.state_dict()["state"].items() for name, value in values.items()
    }
    files = {
        WEIGHTS: dict(whole_weights(model, workers)),
        OPTIMIZER: _whole(((name, whole(value)) for name, value in moments.items()), workers),
    }
    if best is not None:
        files[BEST] = _whole(((name, joined_parts(part, parameters[name])) for name, part in best.items()), workers)
    if not workers.leads:
        return
    target = folder / f"step-{state.step:08d}"
    older = [path for path in folder.glob("step-*") if path != target]
    with whole_folder(target) as temporary:
        for file, tensors in files.items():
            save_file(tensors, temporary / file)
            faults.reach("checkpoint.between_files")
        write_json(temporary / STATE, asdict(state))
    faults.reach("checkpoint.before_older_go")
    for path in older:
        shutil.rmtree(path)


def load(folder: Path, model: nn.Module, optimizer: Optimizer, workers: Workers = ALONE) -> tuple[State, Weights | None] | None:
    """Put the newest whole checkpoint into model and optimizer; its state and best weights, or None where there is none."""
    found = workers.broadcast(last_checkpoint(folder))
    if found is None:
        return None
    _, path = found
    parameters = trained(model)
    put_back(model, _parts(load_file(path / WEIGHTS), parameters))
    in_order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path / OPTIMIZER).items():
        index, name = key.split(".", 1)
        like = in_order[int(index)]
        # The count of steps is one number, and nothing of it is divided.
        moments.setdefault(int(index), {})[name] = divided(value, like) if value.shape == like.shape else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    state = State(**json.loads((path / STATE).read_text(encoding="utf-8")))
    return state, _parts(load_file(path / BEST), parameters) if (path / BEST).exists() else None


def whole_weights(model: nn.Module, workers: Workers) -> Weights:
    """The trained weights, whole, in the leading worker's own memory; every worker has to ask for them, the others get none."""
    return _whole(((name, whole(parameter.detach())) for name, parameter in trained(model).items()), workers)


def _whole(tensors: Iterable[tuple[str, Tensor]], workers: Workers) -> dict[str, Tensor]:
    """What the leading worker keeps; the others helped to put each together, one after the other, and let it go."""
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if workers.leads:
            kept[name] = (tensor.cpu() if workers.sharded else tensor).contiguous()
    return kept


def _parts(weights: Weights, parameters: Mapping[str, nn.Parameter]) -> Weights:
    """This worker's parts of whole weights."""
    return {name: own(divided(weights[name], parameter.detach())) for name, parameter in parameters.items()}
