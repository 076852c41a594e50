from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.test_formats_imports import feedback_row

from pairloop.cli import pairloop
from pairloop.cli.output import emit

ROW = '{"prompt": "Say hello to Ann.", "chosen": "Hello Ann!", "rejected": "What?"}\n'


def run(*args: str) -> Result:
    return CliRunner().invoke(pairloop, list(args), catch_exceptions=False)


def run_json(*args: str) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def bot(tmp_path: Path) -> Path:
    """A folder made by ``pairloop init`` for the policy without a model."""
    directory = tmp_path / "bot"
    run_json("init", str(directory), "--model", "fake")
    return directory


def test_the_command_answers_without_the_heavy_rooms() -> None:
    heavy = "{'torch', 'transformers', 'fastapi', 'sqlalchemy', 'pydantic', 'matplotlib'}"
    code = f"import sys, pairloop.cli; loaded = {heavy} & set(sys.modules); sys.exit(f'loaded: {{loaded}}' if loaded else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_every_verb_has_help_and_json() -> None:
    def visit(command: Any, path: list[str]) -> None:
        result = run(*path, "--help")
        assert result.exit_code == 0
        for name, child in getattr(command, "commands", {}).items():
            visit(child, [*path, name])
        if not getattr(command, "commands", None):
            assert "--json" in result.output, path

    visit(pairloop, [])


def test_the_list_of_verbs_has_whole_sentences_and_knows_what_was_meant() -> None:
    assert run("--help").output.count("...") == 1  # `[ARGS]...`; no sentence is cut
    assert "or what an open duel still lacks" in " ".join(run("gate", "--help").output.split())
    missing = run("status")
    assert missing.exit_code == 2
    assert "Did you mean 'pairloop cycle status'?" in missing.output
    assert "Did you mean 'versions'?" in run("verions").output


def test_init_refuses_to_overwrite(bot: Path) -> None:
    result = run("init", str(bot), "--model", "fake", "--json")
    assert result.exit_code == 2
    assert "--force" in json.loads(result.stdout)["error"]["message"]


def test_a_fresh_folder_has_nothing_and_says_so(bot: Path) -> None:
    assert run_json("cycle", "list", "--config", str(bot)) == {"cycles": []}
    standing = run_json("cycle", "status", "--config", str(bot))
    assert (standing["state"], standing["champion"], standing["new_pairs"]) == ("idle", 0, 0)
    nothing = ("number", "progress", "run", "duel", "last_verdict")
    assert {key: standing[key] for key in nothing} == dict.fromkeys(nothing)
    assert "state: idle" in run("cycle", "status", "--config", str(bot)).stdout.splitlines()
    assert "no cycle yet of support-bot" in run("gate", "explain", "--config", str(bot)).output
    assert run("keys", "list", "--config", str(bot)).output.startswith("no keys yet: pairloop keys create")
    assert run("data", "stats", "--config", str(bot)).output == "no rows and no picks yet\n"
    assert run_json("doctor", "--config", str(bot)) == {"problems": []}
    assert run_json("pairs", "build", "--config", str(bot))["dataset"] is None
    assert "no new feedback" in run("pairs", "build", "--config", str(bot)).output
    assert run_json("data", "stats", "--config", str(bot))["pairs"] == {"train": 0, "heldout": 0}


def test_imported_rows_become_a_dataset_a_version_and_rows_again(bot: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(ROW.replace("Ann", f"Ann {n}") for n in range(40)))
    first = run_json("data", "import", str(rows), "--config", str(bot))
    assert (first["rows"], first["imported"]) == (40, 40)
    again = run_json("data", "import", str(rows), "--config", str(bot))
    assert (again["imported"], again["known"]) == (0, 40)

    dataset = run_json("pairs", "build", "--config", str(bot))["dataset"]
    assert dataset["n_train"] + dataset["n_heldout"] == 40
    stats = run_json("data", "stats", "--config", str(bot))
    assert stats["dataset_id"] == dataset["dataset_id"]
    record = run_json("train", "--config", str(bot), "--dataset", dataset["dataset_id"])
    assert record["version"]["number"] == 1

    report = run_json("evaluate", "--config", str(bot), "--version", "1")
    assert "length_ratio" in report["metrics"]
    assert run_json("promote", "1", "--config", str(bot), "--reason", "looks good")["number"] == 1
    assert run_json("versions", "--config", str(bot))["aliases"] == {"champion": 1}
    assert run_json("rollback", "--config", str(bot), "--reason", "it does not")["number"] == 0
    assert run_json("doctor", "--config", str(bot)) == {"problems": []}

    out = tmp_path / "out.jsonl"
    exported = run_json("data", "export", "--config", str(bot), "--out", str(out), "--format", "trl")
    assert exported["rows"] == dataset["n_train"]
    assert run_json("data", "stats", str(out))["pairs"]["train"] > 0
    refused = run("data", "export", "--config", str(bot), "--out", str(out), "--format", "openai")
    assert refused.exit_code == 2
    assert f"cannot hold {exported['rows']} of {exported['rows']} rows (plain_prompt" in refused.output


SCORED = (
    '{{"prompt": "Say hello to {0}.", "responses": [{{"content": "Hello {0}!", "score": 1}}, '
    '{{"content": "Hello.", "score": 0.5}}, {{"content": "What?", "score": 0}}]}}\n'
)


def test_a_run_on_scored_groups(tmp_path: Path) -> None:
    rows, others, flat = (tmp_path / name for name in ("rows.jsonl", "others.jsonl", "flat.jsonl"))
    rows.write_text("".join(SCORED.format(f"Ann {n}") for n in range(12)))
    others.write_text(SCORED.format("Bob"))
    flat.write_text(SCORED.format("Ann").replace('"score": 1', '"score": 0').replace("0.5", "0"))
    wanted = ["train", "--data", str(rows), "--model", "fake", "--objective", "grpo", "--learning-rate-multiplier", "2"]
    done = run_json(*wanted, "--out", str(tmp_path / "one"), "--validation", str(others))
    assert (done["rows"], done["pairs"], done["result"]["pairs"]) == (12, {"train": 12, "heldout": 1}, 12)
    metrics = (tmp_path / "one" / "training" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["lr"] == pytest.approx(2e-5)
    split = run_json(*wanted, "--out", str(tmp_path / "two"), "--heldout-share", "0.5")
    assert sum(split["pairs"].values()) == 12
    assert split["pairs"]["heldout"] > 0
    # The default objective takes them apart into pairs; where nothing differs, nothing can be learned.
    pairs = run_json(*wanted[:5], "--out", str(tmp_path / "three"), "--validation", str(others))
    assert pairs["pairs"] == {"train": 36, "heldout": 3}
    refused = run(*wanted[:1], "--data", str(flat), *wanted[3:], "--out", str(tmp_path / "four"))
    assert refused.exit_code == 2
    assert "nothing to train on with objective 'grpo': 3 equal scores" in refused.output


def test_bad_rows_are_all_named(tmp_path: Path, bot: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROW + '{"prompt": "x", "chosen": "y"\n' + ROW.replace('"What?"', "7") + ROW.replace("What?", "Hello Ann!"))
    result = run("data", "import", str(rows), "--config", str(bot), "--json")
    assert result.exit_code == 2
    problems = json.loads(result.stdout)["error"]["problems"]
    assert [problem["line"] for problem in problems] == [2, 3, 4]
    kept = run_json("data", "import", str(rows), "--config", str(bot), "--skip-refused")
    assert kept["imported"] == 1
    assert sum(kept["refused"].values()) == 3


def test_a_file_is_checked_as_text_and_as_json(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROW)
    good = run_json("data", "check", str(rows))
    assert (good["family"], good["rows"], good["kept"], good["problems"]) == ("trl", 1, 1, [])
    rows.write_text(ROW + ROW.replace('"What?"', "7") + ROW.replace("Say hello to Ann.", "Hello " * 2_000))
    as_text = run("data", "check", str(rows), "--model", "starter")
    assert as_text.exit_code == 2
    first, second, *_ = as_text.output.splitlines()
    assert first == f"{rows}:2: $.rejected: expected a string, found a number [not_a_string]"
    assert second.startswith(f"{rows}:3: $: prompt and answer have ")
    assert second.endswith("[over_long]")
    as_json = run("data", "check", str(rows), "--json")
    assert as_json.exit_code == 2
    document = json.loads(as_json.stdout)
    assert (document["kept"], document["refused"]) == (2, {"not_a_string": 1})
    assert [(problem["line"], problem["json_path"]) for problem in document["problems"]] == [(2, "$.rejected")]


def test_feedback_of_another_tool_is_imported(tmp_path: Path, bot: Path) -> None:
    export = tmp_path / "feedback-history-export.json"
    export.write_text(json.dumps([feedback_row("a2", 1, ["bot-b"]), feedback_row("a3", -1, None)]))
    assert run_json("data", "import", str(export), "--config", str(bot))["imported"] == 2
    assert run_json("data", "import", str(export), "--config", str(bot))["known"] == 2
    assert run_json("pairs", "build", "--config", str(bot))["counts"]["comparisons"] == 1


def test_an_unknown_version_is_a_clear_error(bot: Path) -> None:
    run_json("pairs", "build", "--config", str(bot))
    result = run("promote", "9", "--config", str(bot), "--reason", "x")
    assert result.exit_code == 2
    assert "9" in result.output


def test_the_champion_is_not_compared_with_itself(bot: Path) -> None:
    result = run("evaluate", "--config", str(bot), "--version", "0")
    assert (result.exit_code, "support-bot@0 is the champion" in result.output) == (2, True)


def test_serve_takes_the_configuration_that_lies_here(bot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it another, empty store would be served from the same folder."""
    monkeypatch.chdir(bot)
    (bot / "pairloop.toml").write_text("[serve]\nprot = 1\n")
    result = run("serve", "--host", "0.0.0.0")  # which is refused anyway
    assert result.exit_code == 2
    assert "pairloop.toml: serve.prot: unknown key; did you mean serve.port?" in result.output
    assert not (bot / "pairloop-data").exists()


def test_missing_configuration_is_named(tmp_path: Path) -> None:
    result = run("cycle", "status", "--config", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert "pairloop init" in result.output


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("init", "/proc/pairloop-cannot-be-here"), 1),
        (("train", "--model", "starter", "--out", "somewhere"), 2),
        (("train", "--data", __file__, "--dataset", "x", "--out", "somewhere"), 2),
        (("data", "stats", __file__), 0),
    ],
)
def test_what_cannot_be_done_is_said_without_a_traceback(arguments: tuple[str, ...], code: int) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output


def test_a_configuration_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "pairloop.toml").write_bytes(b"\xff\xfe\x00")
    result = run("cycle", "status", "--config", str(tmp_path))
    assert result.exit_code == 2
    assert "not valid TOML" in result.output


def test_numbers_that_are_not_finite_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"loss": float("nan"), "e_value": float("inf"), "n": 1.5})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "e_value": None, "n": 1.5}
