"""The conductor's side of the race: contestants in processes of their own, one turn after the other. No torch."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from pairloop.bench.settings import OnStep
from pairloop.config import child_env
from pairloop.errors import SystemFailure

TURN_TIMEOUT_S = 900.0

Spec = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn cost: its units (pairs or tokens), and the peak so far, in all and above what was held before step 1."""

    units: int
    cpu_s: float
    wall_s: float
    peak_mb: float
    net_mb: float

    def cost(self, device: str) -> float:
        """Seconds per unit: of the CPU there, of the clock where another device does the work."""
        return (self.cpu_s if device == "cpu" else self.wall_s) / self.units


@dataclass(slots=True)
class Outcome:
    """A contestant's turns, without the warm-up, and what it said of itself beforehand."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)

    def median_cost(self, device: str) -> float:
        return median(turn.cost(device) for turn in self.turns)


class Contestant:
    """One process that runs ``spec["contestant"]`` (see `worker`); SystemFailure where it fails or takes no step in time."""

    def __init__(self, name: str, spec: Spec, folder: Path, *, threads: int) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        path = folder / f"{name}.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        env = child_env(
            OMP_NUM_THREADS=str(threads),
            TOKENIZERS_PARALLELISM="false",
            HF_HUB_OFFLINE="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_DATASETS_CACHE=str(folder / "datasets"),
            TQDM_DISABLE="1",
        )
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pairloop.bench.worker", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                text=True,
            )

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()

    def facts(self) -> Mapping[str, Any]:
        """What the contestant says when it is ready."""
        return self._answer()

    def turn(self, steps: int) -> Turn:
        """Have it take ``steps`` steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self._process.stdin.flush()
        return Turn(**self._answer())

    def _answer(self) -> Mapping[str, Any]:
        assert self._process.stdout is not None
        # A contestant that hangs is ended, which ends the wait too.
        watchdog = threading.Timer(TURN_TIMEOUT_S, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        answer: Mapping[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise SystemFailure(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        tail = self._log.read_text(encoding="utf-8", errors="replace")[-2_000:].strip()
        return f"ended without an answer (killed, or out of memory)\n{tail}"


def race(
    specs: Mapping[str, Spec], folder: Path, *, rounds: int, steps: int, threads: int, on_step: OnStep, title: str
) -> dict[str, Outcome]:
    """Every contestant's turns: one of warm-up that does not count, then ``rounds``, all contestants in each.

    Who begins moves on by one each round.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    with ExitStack() as stack:
        names: Sequence[str] = list(specs)
        runners: dict[str, Contestant] = {}
        # One after the other, as some measure while they get ready.
        for done, (name, spec) in enumerate(specs.items()):
            on_step(f"{title}: getting ready", done, len(specs))
            runners[name] = stack.enter_context(Contestant(name, spec, folder, threads=threads))
            outcomes[name] = Outcome(runners[name].facts())
        for turn in range(rounds + 1):
            on_step(title, turn, rounds + 1)
            first = turn % len(names)
            for name in [*names[first:], *names[:first]]:
                taken = runners[name].turn(1 if turn == 0 else steps)
                if turn:
                    outcomes[name].turns.append(taken)
    return outcomes


def ratios(ours: Outcome, peer: Outcome, device: str, extra: float = 0.0) -> dict[str, float]:
    """Round by round, how many times the peer's cost ours is; ``extra``: seconds per unit that the peer paid beforehand."""
    found = [(theirs.cost(device) + extra) / mine.cost(device) for mine, theirs in zip(ours.turns, peer.turns, strict=True)]
    return spread(found)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": median(values), "max": max(values)}


def figures(outcome: Outcome, device: str, units: str) -> dict[str, Any]:
    """Medians over the turns, with the spread of what costs; ``units``: what a turn makes, such as pairs."""
    rates = spread([1 / turn.cost(device) for turn in outcome.turns])
    return {
        f"{units}_per_{'cpu_' if device == 'cpu' else ''}s": rates["median"],
        "spread": rates,
        f"{units}_per_wall_s": median(turn.units / turn.wall_s for turn in outcome.turns),
        "peak_mb": max(turn.peak_mb for turn in outcome.turns),
        "net_mb": max(turn.net_mb for turn in outcome.turns),
    }
