"""The results files: what was measured, by which command of which version, from which seed; whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pairloop import __version__
from pairloop.errors import NotFoundError, UserError
from pairloop.lab.claims.base import Claim, Outcome, Settings


@dataclass(frozen=True, slots=True)
class Measurement:
    """One claim's measurement. measured_at: UTC, ISO 8601. cpu_s: of this process and the children it waited for."""

    claim: str
    command: str
    pairloop: str
    seed: int
    measured_at: str
    cpu_s: float
    data: dict[str, Any]


def measure(claim: Claim, settings: Settings) -> Measurement:
    """Runs the claim's own measurement; UserError where another command makes its data."""
    if claim.run is None:
        raise UserError(f"{claim.id} is not measured by itself: run `{claim.command}`")
    before = _cpu_s()
    data = claim.run(settings)
    return Measurement(
        claim=claim.id,
        command=f"{claim.command} --seed {settings.seed}",
        pairloop=__version__,
        seed=settings.seed,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu_s=round(_cpu_s() - before, 1),
        data=data,
    )


def write(measurement: Measurement, claim: Claim, folder: Path) -> Path:
    """The measurement as a file of ``folder``; an interrupted write leaves the older file as it was."""
    return write_document(asdict(measurement), folder / claim.file_name)


def write_document(document: Mapping[str, Any], path: Path) -> Path:
    """JSON for people to compare: one value a line, numbers unrounded, nothing that is not finite."""
    return write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> Path:
    """The file whole, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read(claim: Claim, folder: Path) -> Measurement | None:
    """The claim's measurement, or None where there is no file; UserError names a file that is broken or another claim's.

    A file that another verb wrote is its document alone: command and data are known, when and how long are not.
    """
    path = folder / claim.file_name
    document = _document(path)
    if document is None:
        return None
    if claim.run is None:
        return Measurement(claim.id, claim.command, "", 0, "", 0.0, document)
    try:
        measurement = Measurement(**document)
    except TypeError as error:
        raise UserError(f"{path}: not a measurement of {claim.id}: {error}; measure it again: `{claim.command}`") from error
    if measurement.claim != claim.id:
        raise UserError(f"{path}: holds the results of {measurement.claim}, not of {claim.id}")
    if not isinstance(measurement.data, dict):
        raise UserError(f"{path}: `data` is no object")
    return measurement


def judged(claim: Claim, measurement: Measurement, origin: Path | None = None) -> Outcome:
    """The claim's outcome; UserError (naming ``origin``, the file) where the data are not what its judge reads."""
    where = f"{origin}: " if origin else ""
    if claim.judge is None:
        raise NotFoundError(f"{where}nothing judges {claim.id} yet")
    try:
        return claim.judge(measurement.data)
    except (LookupError, TypeError, ValueError, StopIteration, ZeroDivisionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}not what {claim.id} measures ({why}); measure it again: `{claim.command}`") from error


def _document(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds no JSON object")
    return document


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
