"""A real ``pairloop serve`` in a process of its own, on loopback, with its log in a file; ended by its own pid."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pairloop.config import child_env
from pairloop.errors import SystemFailure

_LISTENING = re.compile(r"listening on (http://\S+)")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class ServerProcess:
    """A running server: its process, its address, its log file."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def stop(self) -> None:
        """Ends the server politely, and by force where it does not listen."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def cpu_s(self) -> float:
        """CPU seconds of the server and its finished children so far; 0 where the system does not tell."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        if not stat.exists():
            return 0.0
        fields = stat.read_text().rsplit(")", 1)[1].split()
        return sum(int(field) for field in fields[11:15]) / 100.0


def start_server(config: Path, *, port: int = 0, log: Path) -> ServerProcess:
    """Starts ``pairloop serve --config config`` and waits until it says where it listens.

    Raises SystemFailure with the end of its log where it ends first or stays silent for a minute.
    """
    offset = log.stat().st_size if log.exists() else 0
    command = [sys.executable, "-m", "pairloop", "serve", "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=child_env(PYTHONUNBUFFERED="1")
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        text = log.read_bytes()[offset:].decode(errors="replace")
        if (match := _LISTENING.search(text)) is not None:
            return ServerProcess(process, match[1].rstrip("/"), log)
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        break
    process.kill()
    process.wait()
    tail = log.read_bytes()[offset:].decode(errors="replace")[-2_000:]
    raise SystemFailure(f"the server did not start; the end of {log}:\n{tail}")
