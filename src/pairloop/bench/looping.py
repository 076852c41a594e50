"""The whole loop beside the script that a team would write: `pairloop demo`, and `diy` by TRL's defaults and tuned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pairloop.bench.diy import SETTINGS
from pairloop.bench.settings import Settings
from pairloop.config import child_env
from pairloop.errors import SystemFailure

OURS = "pairloop"
ROUNDS, QUICK_ROUNDS = 4, 1
BASELINE = "trl_tuned"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a process and all that it started and waited for took; ``peak_mb``: of the largest of these processes."""

    cpu_s: float
    wall_s: float
    peak_mb: float

    def as_json(self) -> dict[str, float]:
        return {"cpu_s": round(self.cpu_s, 2), "wall_s": round(self.wall_s, 2), "peak_mb": round(self.peak_mb, 1)}


def bench(settings: Settings, *, seed: int = 0) -> dict[str, Any]:
    """Each contestant's cost and quality, and where pairloop's time goes from the last pick to the new version."""
    folder = settings.folder / "loop"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    settings.on_step("the loop", 0, len(SETTINGS) + 1)
    ours = _ours(settings, folder, rounds, seed)
    peers: dict[str, Any] = {}
    for done, name in enumerate(SETTINGS, start=1):
        settings.on_step("the loop", done, len(SETTINGS) + 1)
        peers[name] = _theirs(settings, folder, name, rounds, seed)
    for peer in peers.values():
        peer["ratio"] = peer["cpu_s"] / ours["cpu_s"]
        peer["training_ratio"] = peer["cpu_s_by_phase"]["training"] / ours["training_cpu_s"]
    return {"rounds": rounds, "seed": seed, OURS: ours, "peers": peers}


def _ours(settings: Settings, folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    out = folder / "demo"
    command = [sys.executable, "-m", "pairloop", "demo", "--json", "--out", str(out)]
    cost = _run([*command, "--rounds", str(rounds), "--seed", str(seed)], folder / "demo.log", settings.threads)
    demo = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("runs/*/result.json"))]
    if not runs:
        raise SystemFailure(f"{out}: the demo trained nothing; see {folder / 'demo.log'}")
    steps = ("building", "training", "checking")
    seconds = [{step: found["seconds"].get(step, 0.0) for step in steps} for found in demo["rounds"]]
    return cost.as_json() | {
        "training_cpu_s": sum(run["cpu_s"] for run in runs),
        "pairs": [run["pairs"] for run in runs],
        "last_pick_to_new_version_s": {step: fmean(row[step] for row in seconds) for step in steps},
        "rounds": [{key: found[key] for key in ("verdict", "win_rate", "utility")} for found in demo["rounds"]],
        "win_rate": demo["final"]["win_rate"],
        "utility": demo["final"]["utility"],
    }


def _theirs(settings: Settings, folder: Path, name: str, rounds: int, seed: int) -> dict[str, Any]:
    out = folder / f"{name}.json"
    job: Mapping[str, Any] = {
        "settings": name,
        "rounds": rounds,
        "seed": seed,
        "threads": settings.threads,
        "folder": str(folder / name),
        "out": str(out),
    }
    path = folder / f"{name}-job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "pairloop.bench.diy", str(path)]
    cost = _run(command, folder / f"{name}.log", settings.threads)
    found = json.loads(out.read_text(encoding="utf-8"))
    return cost.as_json() | {
        "cpu_s_by_phase": found["cpu_s"],
        "rounds": found["rounds"],
        "win_rate": found["rounds"][-1]["win_rate"],
        "utility": found["rounds"][-1]["utility"],
        "settings": dict(SETTINGS[name]),
    }


def _run(command: Sequence[str], log_path: Path, threads: int) -> Cost:
    """Run to the end; SystemFailure with the log's end where it fails."""
    env = child_env(
        OMP_NUM_THREADS=str(threads),
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        TQDM_DISABLE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    started_s = time.perf_counter()
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log_path.read_text(encoding="utf-8", errors="replace")[-2_000:]
        raise SystemFailure(f"{' '.join(command[1:4])} ended with exit code {process.returncode}; {log_path}:\n{tail}")
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - started_s, usage.ru_maxrss / 1024)
