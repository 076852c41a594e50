"""What every benchmark is told. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pairloop.errors import UserError

Mode = Literal["full", "lora"]
OnStep = Callable[[str, int, int], None]

ROUNDS = 5
QUICK_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """``folder``: models and logs. ``quick``: fewer rounds, and the peer's settings as known, unsearched."""

    folder: Path
    on_step: OnStep
    cells: str | None = None
    device: str = "cpu"
    threads: int = 1
    quick: bool = False

    @property
    def rounds(self) -> int:
        return QUICK_ROUNDS if self.quick else ROUNDS


def refuse_missing(device: str) -> None:
    """UserError where the peers or the device are not here, before anything is measured."""
    missing = [name for name in ("trl", "datasets") if find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is missing: pip install 'pairloop[bench]'")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu, or a torch build with CUDA")
