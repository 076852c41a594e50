"""Servers that the benchmarks measure: processes of their own, and what they took so far. No torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pairloop.config import child_env
from pairloop.errors import SystemFailure
from pairloop.scaffold import write_config

PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server's process and where it listens."""

    pid: int
    url: str

    @property
    def cpu_s(self) -> float:
        """CPU seconds so far, those of its threads together."""
        fields = self._proc("stat").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def rss_mb(self) -> float:
        return int(self._proc("statm").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    @property
    def peak_mb(self) -> float:
        """The most that the process ever held; what it holds where the system kept no account of that."""
        peaks = [line for line in self._proc("status").splitlines() if line.startswith("VmHWM:")]
        return int(peaks[0].split()[1]) * 1024 / 1e6 if peaks else self.rss_mb

    def _proc(self, name: str) -> str:
        try:
            return Path(f"/proc/{self.pid}/{name}").read_text()
        except OSError as error:
            raise SystemFailure(f"this benchmark reads what a process took from /proc, which is not there: {error}") from error


@contextmanager
def pairloop_server(folder: Path, policy: str) -> Iterator[Server]:
    """`pairloop serve` with the fake policy, API and page only."""
    write_config(folder / "state", {"policy": {"name": policy, "model": "fake", "method": "full"}}, force=True)
    command = ["-m", "pairloop", "serve", "--config", str(folder / "state"), "--port", "0", "--no-scheduler"]
    with process(command, folder / "serve.log") as server:
        yield server


@contextmanager
def process(arguments: list[str], log_path: Path) -> Iterator[Server]:
    """A Python process that says where it listens, ended at the end."""
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=log, env=child_env(PYTHONUNBUFFERED="1"), text=True
        )
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            if "http" not in line:
                raise SystemFailure(f"the server did not start; see {log_path}")
            yield Server(child.pid, line[line.index("http") :].strip())
        finally:
            child.terminate()
            child.wait(PATIENCE_S)
            assert child.stdout is not None
            child.stdout.close()
