"""The wheel works alone: built, installed into an empty environment, it runs the demo."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
STEP_TIMEOUT_S = 900


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=STEP_TIMEOUT_S, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_an_empty_environment(tmp_path: Path) -> None:
    _run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(REPOSITORY), cwd=tmp_path)
    wheel = next(tmp_path.glob("*.whl"))
    venv.create(tmp_path / "env", with_pip=True)
    bin_dir = tmp_path / "env" / "bin"
    _run(str(bin_dir / "pip"), "install", "-q", "-c", str(REPOSITORY / "constraints.txt"), str(wheel), cwd=tmp_path)
    output = _run(str(bin_dir / "pairloop"), "demo", "--rounds", "1", "--out", "demo", "--json", cwd=tmp_path)
    document = json.loads(output)
    assert len(document["rounds"]) == 1
    assert document["rounds"][0]["n"] >= 400
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
