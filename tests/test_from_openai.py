"""docs/from-openai.md as a reader runs it: the official client alone, against a fresh server with the starter."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.openai_schema import check

from pairloop.demo.server import ServerProcess, start_server

PAGE = (Path(__file__).parents[1] / "docs" / "from-openai.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SHELL = [
    line.split("#")[0].strip() for text in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL) for line in text.splitlines()
]

pytestmark = pytest.mark.slow


def _pairloop(start: str, folder: Path) -> str:
    """Runs the page's shell line that begins with ``start`` in ``folder``; its output."""
    [line] = [line for line in SHELL if line.startswith(start)]
    command = [sys.executable, "-m", *shlex.split(line)]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("from_openai")
    _pairloop("pairloop init", folder)
    started = start_server(folder / "bot" / "pairloop.toml", log=folder / "server.log")
    yield started
    started.stop()


def test_the_page_speaks_to_openai_alone() -> None:
    code = "\n".join(PYTHON)
    assert set(re.findall(r"^(?:from|import) (\w+)", code, flags=re.MULTILINE)) == {"openai", "json", "time"}


def test_every_block_runs_and_every_body_is_by_the_schema(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    checked: list[str] = []

    def seen(response: httpx.Response) -> None:
        check(response)
        checked.append(f"{response.request.method} {response.request.url.path}")

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(PYTHON[0], scope)
        scope["client"]._client.event_hooks["response"].append(seen)  # what follows is checked, and the first block again
        for block in PYTHON:
            exec(block.replace("client = OpenAI()\n", ""), scope)
    job = scope["job"]
    assert job.status == "succeeded", printed.getvalue()
    assert job.fine_tuned_model.startswith("ft:")
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 64
    assert all(scope["texts"]), "a stream of two answers"
    assert {line.split(" ")[0] for line in printed.getvalue().splitlines()} >= {"succeeded", "info"}
    assert len({re.sub(r"(ftjob|file|chatcmpl)-[^/]+", r"\1", path) for path in checked}) >= 8, checked
    with scope["client"] as client:
        champion = client.chat.completions.create(model="support-bot", messages=[{"role": "user", "content": "Hello"}])
        assert champion.model == "support-bot@0", "a job's model is nobody's champion before someone says so"
    promoted = _pairloop("pairloop promote", server.log.parent)
    assert "champion" in promoted or "promote" in promoted
