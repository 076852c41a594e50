"""A training job and its result, as the parent and the child process exchange them: plain JSON, no torch.

The folder of a run: ``job.json`` (written by the parent), ``metrics.jsonl`` (appended by the child: one row per optimizer
step, after each held-out look one whose figures are under ``heldout``, and after each kept epoch one whose figures are under
``epoch``), ``checkpoints/step-<n>`` (whole or absent), ``epochs/step-<n>`` (the model as it was served then, whole or absent),
``out`` (whole or absent), ``result.json`` (written last).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pairloop.config import TrainSection
from pairloop.errors import StoreError
from pairloop.types import VersionKind

FAKE = "fake"
"""The base directory of the policy without a model."""

LOCK = "lock"
"""The file in the folder of checkpoints that a training process holds."""

DISK_FULL = "disk_full"
ERROR_CODES: Mapping[str, Literal["user_error", "system_error"]] = MappingProxyType(
    {
        # the input or the settings are at fault: the same run fails again
        "bad_rows": "user_error",  # a row of the snapshot cannot be read
        "unfit_rows": "user_error",  # the objective cannot learn from rows of this kind
        "bad_model": "user_error",  # the parent or its base cannot be loaded
        "bad_settings": "user_error",  # settings that do not go together, or not with the data or the machine
        "bad_input": "user_error",  # any other fault of the input
        "nan": "user_error",  # loss or gradient were not finite three steps in a row
        "checkpoint_mismatch": "user_error",  # the folder's checkpoint belongs to other data or settings
        # the machine is at fault: trying again may help
        "out_of_memory": "system_error",
        DISK_FULL: "system_error",
        "io_error": "system_error",  # any other fault of a disk
        "crash": "system_error",  # an error that nobody foresaw, which is named
        "child_died": "system_error",  # the process was killed, or crashed, several times in a row without getting further
    }
)
"""Every `TrainError.code` and whose fault it is; stable."""

EXIT_CODES = {"user_error": 2, "system_error": 1}


WHERE = ("launcher", "processes", "sharding", "ray_address")
"""Settings that say where a run is done, and not what comes out: it may be resumed with others."""


_PLACES = frozenset(
    {
        "out_dir",
        "checkpoint_dir",
        "epochs_dir",
        "metrics_path",
        "result_path",
        "snapshot_dir",
        "base_dir",
        "parent_path",
        "run_id",
    }
)


class TrainStatus(StrEnum):
    """How a run ended; one that is PAUSED goes on from its last checkpoint when it is called again."""

    SUCCEEDED = "succeeded"
    NOTHING_TO_TRAIN = "nothing_to_train"
    FAILED = "failed"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class TrainError:
    """Why a run failed: a stable code of `ERROR_CODES`, whose fault, and a sentence with the remedy."""

    code: str
    kind: Literal["user_error", "system_error"]
    message: str


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What the child is to do. Paths are absolute; ``parent_path`` is None for the base."""

    base_dir: str
    parent_path: str | None
    parent_kind: VersionKind
    parent_version: int
    method: Literal["full", "lora"]
    snapshot_dir: str
    out_dir: str
    checkpoint_dir: str
    metrics_path: str
    result_path: str
    train: TrainSection = field(default_factory=TrainSection)
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["none", "nf4"] = "none"
    device: str = "auto"
    run_id: str = ""
    """The same for all attempts."""
    max_context: int = 0
    """Longest prompt plus completion that the model serves; 0 takes the model's own limit."""
    epochs_dir: str = ""
    """Where the model as it stands after each epoch is kept, ready to be served; empty keeps none."""

    @classmethod
    def in_folder(cls, folder: Path, *, keep_epochs: bool = False, **settings: Any) -> TrainJob:
        """A job named by ``folder``, in which its own files lie under the names of this module's docstring."""
        folder = folder.resolve()
        return cls(
            **{"run_id": folder.name, **settings},
            epochs_dir=str(folder / "epochs") if keep_epochs else "",
            out_dir=str(folder / "out"),
            checkpoint_dir=str(folder / "checkpoints"),
            metrics_path=str(folder / "metrics.jsonl"),
            result_path=str(folder / "result.json"),
        )

    def save(self, path: Path) -> None:
        write_json(path, {**asdict(self), "train": self.train.model_dump(mode="json")})

    @classmethod
    def load(cls, path: Path) -> TrainJob:
        data = json.loads(path.read_text(encoding="utf-8"))
        targets = data["lora_targets"]
        return cls(
            **{
                **data,
                "train": TrainSection.model_validate(data["train"]),
                "parent_kind": VersionKind(data["parent_kind"]),
                "lora_targets": targets if targets == "all-linear" else tuple(targets),
            }
        )

    def recipe(self) -> dict[str, Any]:
        """What decides the weights that come out, without the places where things lie."""
        data = {**asdict(self), "train": self.train.model_dump(mode="json", exclude={"checkpoint_every", *WHERE})}
        return {key: value for key, value in data.items() if key not in _PLACES}


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    ``pairs``: rows trained on (pairs, demonstrations, scored groups). ``metrics``: of the last step; ``ess_mean`` and
    ``ess_min`` of all steps. ``reference``: how many rows used recorded log-probs, how many the parent scored, and the
    token-by-token check. ``dropped``: reason → rows not used. ``heldout_before`` and ``heldout_after``: the metrics of the
    held-out rows under the parent and the new version. ``stopped_because``: ``too_few_pairs``, or what the round controller
    said (see `Stop.reason`); ``stop_message``: the same as a sentence with its figures. ``weights_step``: the step whose
    weights were taken. ``warnings``: the controller's. ``processes``: how many trained it. ``trained_tokens``: of all
    sequences of all steps, prompts included. Times in seconds, from the last checkpoint's attempts on; ``cpu_s`` of all
    processes.
    """

    status: TrainStatus
    error: TrainError | None = None
    steps: int = 0
    steps_planned: int = 0
    pairs: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    heldout_before: Mapping[str, float] = field(default_factory=dict)
    heldout_after: Mapping[str, float] = field(default_factory=dict)
    skipped_steps: int = 0
    stopped_because: str = ""
    stop_message: str = ""
    weights_step: int = 0
    warnings: Sequence[str] = field(default_factory=list)
    resumed_from: int = 0
    libraries: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1
    trained_tokens: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0

    @property
    def exit_code(self) -> int:
        return 0 if self.error is None else EXIT_CODES[self.error.kind]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: Path) -> None:
        write_json(path, self.as_dict())

    def save_first(self, path: Path, writer: str) -> None:
        """Write it unless there is one already, as of another process that failed before; ``writer`` names this process."""
        own = path.with_name(f".{path.name}.{writer}")
        write_json(own, self.as_dict())
        with suppress(FileExistsError):
            os.link(own, path)
        own.unlink()

    @classmethod
    def load(cls, path: Path) -> TrainResult | None:
        """The result in ``path``, or None where the child wrote none. StoreError where it is not one."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            error = TrainError(**data["error"]) if data["error"] else None
            known = {entry.name for entry in fields(cls)}
            return cls(
                **{**{k: v for k, v in data.items() if k in known}, "status": TrainStatus(data["status"]), "error": error}
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: is not the result of a training run: {error}") from error


def nothing_to_train(pairs: int, dropped: Mapping[str, int]) -> TrainResult:
    """The result of a round with too few usable pairs: no error, and no new version."""
    return TrainResult(
        TrainStatus.NOTHING_TO_TRAIN,
        pairs=pairs,
        dropped=dict(dropped),
        stopped_because="too_few_pairs",
        stop_message=f"{pairs} usable rows are too few to train on",
    )


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write whole or not at all: a temporary name, flushed to disk, renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def last_checkpoint(checkpoint_dir: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint, or None."""
    found = [(int(path.name.removeprefix("step-")), path) for path in checkpoint_dir.glob("step-*") if path.is_dir()]
    return max(found, default=None)


def rewind_metrics(metrics_path: Path, step: int) -> None:
    """Cut the metrics file after the row of ``step``: later rows, and a half-written one, belong to an attempt that is gone."""
    if not metrics_path.is_file():
        return
    keep = 0
    for line in metrics_path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        keep += len(line)
    os.truncate(metrics_path, keep)
