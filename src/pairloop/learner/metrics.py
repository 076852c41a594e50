"""The metrics file, one JSON row per step or held-out look, and the versions of the libraries that made it. No torch."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pairloop import faults
from pairloop.learner.data import TokenGroup

LIBRARIES = ("pairloop", "torch", "transformers", "peft", "tokenizers", "safetensors")


class MetricsFile:
    """Appends rows, each whole and visible to readers at once; numbers that are not finite are written as null."""

    def __init__(self, path: Path, report: Callable[[Mapping[str, Any]], None]) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._report = report

    def write(self, row: Mapping[str, Any]) -> None:
        clean = _finite(row)
        faults.reach("metrics.before_row")
        self._file.write(json.dumps(clean) + "\n")
        self._report(clean)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


_OF_BOTH = {"accuracy", "margin", "reward_rejected", "d_rejected"}


def defined(metrics: Mapping[str, float], groups: Sequence[TokenGroup]) -> dict[str, float]:
    """Without what compares answers, where every group has one alone."""
    lone = all(len(group.completions) == 1 for group in groups)
    return {name: value for name, value in metrics.items() if not (lone and name in _OF_BOTH)}


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _finite(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: clean(value) for key, value in row.items()}


def libraries() -> dict[str, str]:
    """Installed versions of what decides the weights, and of Python."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # running from a source tree that was never installed
            continue
    return found
