"""``pairloop worker``: the loop turns without a server, on the same database and artifacts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from click.testing import CliRunner
from tests.ports import hold_port, number_of
from tests.stores import database_of
from tests.waiting import until

from pairloop.cli import pairloop
from pairloop.config import child_env, load_config
from pairloop.scaffold import write_config
from pairloop.store import Store, cycles
from pairloop.types import CycleState

TIMEOUT_S = 90.0


def test_a_worker_takes_up_imported_rows_by_itself_and_ends_on_request(tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {"policy": {"model": "fake"}, "schedule": {"min_pairs": 20, "poll": "1s"}}
    settings["store"] = database_of(tmp_path / "bot")
    path = write_config(tmp_path / "bot", settings)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Q{n}", "chosen": "yes", "rejected": "no"}) + "\n" for n in range(40)))
    imported = CliRunner().invoke(pairloop, ["data", "import", str(rows), "--config", str(path)])
    assert imported.exit_code == 0, imported.output
    place = hold_port()
    port = number_of(place)
    command = [sys.executable, "-m", "pairloop", "worker", "--config", str(path), "--metrics-port", str(port)]
    env = child_env(PAIRLOOP_LOG_FORMAT="json", PAIRLOOP_SCHEDULE_POL="1s")
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=env)
    try:
        assert _state_of_first_cycle(path, worker) is CycleState.DUELLING
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        assert 'pairloop_cycle_state{state="duelling"} 1.0' in metrics
        assert "pairloop_scheduler_running 1.0" in metrics
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    finally:
        if worker.poll() is None:
            worker.kill()
        output, _ = worker.communicate()
        place.close()
    assert b"turning the loop of support-bot" in output
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["message"].split()[0] for line in lines if line["logger"] == "pairloop.config"] == ["PAIRLOOP_SCHEDULE_POL"]


def _state_of_first_cycle(path: Path, worker: subprocess.Popen[bytes]) -> CycleState | None:
    """Where the first cycle waits or ended, once it does."""
    with Store.open(load_config(path, env={})) as store:

        def state() -> CycleState | None:
            with store.reading() as c:
                found = [one.state for one in cycles.list_(c, "support-bot")]
            waits = [one for one in found if one.is_terminal or one is CycleState.DUELLING]
            assert waits or worker.poll() is None, "the worker ended"
            return waits[0] if waits else None

        return until(state, patience_s=TIMEOUT_S)
