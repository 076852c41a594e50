"""The new version on disk: a plain Hugging Face directory, or a PEFT adapter directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pairloop.learner.files import whole_folder
from pairloop.learner.job import TrainJob

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
_NOT_COPIED = {
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors.index.json",
    "README.md",
    "MODEL_CARD.md",
}


def export(job: TrainJob, model: nn.Module, target: Path) -> None:
    """Write ``target`` whole or not at all; an older one is replaced. The model may be of another type afterwards."""
    saver: Any = model
    with whole_folder(target) as folder:
        if job.method == "lora":
            # Without this, PEFT asks the hub whether the base's vocabulary was changed.
            saver.save_pretrained(folder, save_embedding_layers=False)
            _sort_config(folder / "adapter_config.json")
            (folder / "README.md").unlink(missing_ok=True)  # a form, with nothing filled in
        else:
            saver.to(getattr(torch, job.dtype)).save_pretrained(folder)
            copy_tokenizer(Path(job.base_dir), folder)
        for path in folder.iterdir():
            path.chmod(0o644)  # weights are written for the owner alone, and an engine may be another user


def _sort_config(path: Path) -> None:
    """PEFT writes the target modules in the order of a set, another one in each process; equal adapters have equal files."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_tokenizer(base_dir: Path, folder: Path) -> None:
    """Tokenizer, chat template, licence: the base's plain files, but for weights, prose, and what the export wrote itself."""
    for path in sorted(base_dir.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHTS and path.name not in _NOT_COPIED and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
