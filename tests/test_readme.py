"""The README's promises: its first lines, and its commands as a newcomer types them."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from pairloop.cli import pairloop
from pairloop.demo.server import start_server

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_a_newcomer_sees_the_arrow_the_demo_and_the_tests_first() -> None:
    lines = README.splitlines()
    assert "serve two answers → someone picks one → preference pairs → DPO → gate → deploy → serve" in lines[2]
    assert lines.index("make demo") < 24
    assert 0 < lines.index("make test") - lines.index("make demo") < 10


def _commands(start: str) -> list[str]:
    """The README's shell lines that begin so, without their comments."""
    lines = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
    found = [line.split("#")[0].strip() for line in lines if line.startswith(start)]
    assert found, f"the README shows no {start}"
    return found


def _run(command: str) -> str:
    result = CliRunner().invoke(pairloop, shlex.split(command)[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_its_own_model_section_works_with_the_starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [init] = _commands("pairloop init")
    _run(re.sub(r" --model \S+", "", init))
    [serve] = _commands("pairloop serve")
    config = Path(shlex.split(serve)[-1])
    assert config.exists()
    server = start_server(config, log=tmp_path / "server.log")
    try:
        [code] = [text for kind, text in BLOCKS if kind == "python"]
        printed = io.StringIO()
        scope: dict[str, object] = {}
        with contextlib.redirect_stdout(printed):
            exec(code.replace("http://127.0.0.1:8000", server.url), scope)
        assert len(printed.getvalue().splitlines()) >= 2
        [curl] = [text for kind, text in BLOCKS if "curl" in text]
        body = json.loads(re.search(r"-d '(.*?)'", curl, flags=re.DOTALL)[1])  # type: ignore[index]
        body["inference_id"] = scope["reply"].id  # type: ignore[attr-defined]
        assert httpx.post(f"{server.url}/v1/preferences", json=body, trust_env=False).status_code == 201
    finally:
        server.stop()


@pytest.mark.slow
def test_its_one_off_run_works_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "messages": [{"role": "user", "content": f"Order #{n}?"}],
            "preferred_response": f"It is #{n}.",
            "dispreferred_response": "No.",
        }
        for n in range(100, 140)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [train] = _commands("pairloop train")
    output = _run(train.replace("--model DIR", "--model starter --method full").replace("--out DIR", "--out trained"))
    assert "succeeded" in output
    assert Path("trained/model.safetensors").exists()
    [check] = _commands("pairloop data check")
    assert "40 good, 0 refused" in _run(check)
