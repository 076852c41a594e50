"""Checkpoints from which a killed run goes on to the same bits: trained weights, optimizer state, and where it stood."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pairloop.learner.files import whole_folder
from pairloop.learner.job import last_checkpoint, write_json

WEIGHTS, BEST, OPTIMIZER, STATE = "weights.safetensors", "best.safetensors", "optimizer.safetensors", "state.json"

Weights = Mapping[str, Tensor]


@dataclass(slots=True)
class State:
    """Where a run stands after ``step`` steps; ``controller``: the round controller's state. ``budget``: the
    token budget of a pass.

    The order of the pairs follows from seed and step, so it is not kept.
    """

    fingerprint: str
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
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
    """A copy of the trained weights, in the machine's own memory."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained(model).items()}


def put_back(model: nn.Module, weights: Weights) -> None:
    """Make ``weights`` the trained weights."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(weights[name])


def save(folder: Path, model: nn.Module, optimizer: Optimizer, state: State, best: Weights | None = None) -> None:
    """Write ``step-<n>`` whole or not at all, and remove the older ones. ``best``: weights that may be taken in the end."""
    target = folder / f"step-{state.step:08d}"
    older = [path for path in folder.glob("step-*") if path != target]
    moments = {
        f"{index}.{name}": value for index, values in optimizer.state_dict()["state"].items() for name, value in values.items()
    }
    with whole_folder(target) as temporary:
        save_file({name: parameter.detach().contiguous() for name, parameter in trained(model).items()}, temporary / WEIGHTS)
        save_file({name: value.contiguous() for name, value in moments.items()}, temporary / OPTIMIZER)
        if best is not None:
            save_file({name: value.contiguous() for name, value in best.items()}, temporary / BEST)
        write_json(temporary / STATE, asdict(state))
    for path in older:
        shutil.rmtree(path)


def load(folder: Path, model: nn.Module, optimizer: Optimizer) -> tuple[State, Weights | None] | None:
    """Put the newest whole checkpoint into model and optimizer; its state and best weights, or None where there is none."""
    found = last_checkpoint(folder)
    if found is None:
        return None
    _, path = found
    put_back(model, load_file(path / WEIGHTS))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path / OPTIMIZER).items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    state = State(**json.loads((path / STATE).read_text(encoding="utf-8")))
    return state, load_file(path / BEST) if (path / BEST).exists() else None
