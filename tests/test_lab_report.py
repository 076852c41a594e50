"""The page of claims: made of the results files alone, the same bytes from the same results, and nothing hidden."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pairloop.cli import pairloop
from pairloop.errors import UserError
from pairloop.lab import report
from pairloop.lab.claims import CLAIMS, Claim, Outcome, drawing
from pairloop.lab.claims.base import Data, markdown_table
from pairloop.lab.claims.results import Measurement, write, write_document

DOCS = Path(__file__).parent.parent / "docs"


def draw(data: Data, path: Path) -> None:
    with drawing.axes(path, xlabel="coin", ylabel="heads") as axes:
        axes.plot([0, 1], [0, data["heads"]], label="heads")


def judge(data: Data) -> Outcome:
    return Outcome(data["heads"] >= 0.5, f"{data['heads']} heads", "| a | table |")


def claim(number: int, *, is_shared: bool = False, is_plotted: bool = False) -> Claim:
    return Claim(
        id=f"R{number}",
        title=f"coin {number} falls on heads",
        threshold="half the time",
        command=f"pairloop lab claim R{number}",
        judge=judge,
        run=None if is_shared else lambda settings: {"heads": settings.seed},
        plot=draw if is_plotted else None,
        results="shared" if is_shared else "",
    )


GOOD, BAD, OPEN, SHARED = claim(1, is_plotted=True), claim(2), claim(3), claim(4, is_shared=True)
FOUR = {each.id: each for each in (GOOD, BAD, OPEN, SHARED)}


def measured(of: Claim, heads: float, **changes: Any) -> Measurement:
    fields = {"command": f"{of.command} --seed 0", "pairloop": "0.1.0", "seed": 0, "measured_at": "2026-03-01T10:00:00+00:00"}
    return Measurement(**{"claim": of.id, **fields, "cpu_s": 2.4, "data": {"heads": heads}, **changes})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    write(measured(GOOD, 0.6), GOOD, folder)
    write(measured(BAD, 0.1), BAD, folder)
    write_document({"heads": 0.5}, folder / "shared.json")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_pass_fail_and_not_measured_are_all_printed(results: Path, tmp_path: Path) -> None:
    found = report.write(results, tmp_path / "out" / "science.md", FOUR)
    assert [finding.status for finding in found] == ["pass", "fail", "not measured", "pass"]
    text = (tmp_path / "out" / "science.md").read_text(encoding="utf-8")
    assert text.startswith(report.NOTICE + report.introduction()[:40])
    assert "## The claims: 2 pass, 1 fail, 1 not measured" in text
    assert "| R2 | coin 2 falls on heads | 0.1 heads | fail |" in text
    assert "### R3. coin 3 falls on heads: not measured" in text
    assert "Not measured; `pairloop lab claim R3`." in text
    assert "Measured by `pairloop lab claim R1 --seed 0`, pairloop 0.1.0, 2026-03-01, 2 CPU seconds." in text
    assert "Measured by `pairloop lab claim R4`.\n" in text
    assert text.count("Threshold: half the time.") == 4
    assert "![R1](science/R1.png)" in text
    assert text.count("![") == 1
    assert (tmp_path / "out" / "science" / "R1.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_results_give_the_same_bytes(results: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        report.write(results, tmp_path / name / "science.md", FOUR)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert len(hashes(tmp_path / "one")) == 2
    write(measured(GOOD, 0.61), GOOD, results)
    report.write(results, tmp_path / "two" / "science.md", FOUR)
    assert hashes(tmp_path / "one").keys() == hashes(tmp_path / "two").keys()
    assert not set(hashes(tmp_path / "one").values()) & set(hashes(tmp_path / "two").values())


def test_a_claim_whose_results_are_gone_loses_its_plot(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "science.md"
    report.write(results, out, FOUR)
    assert (tmp_path / "science" / "R1.png").exists()
    (results / "R1.json").unlink()
    assert report.write(results, out, FOUR)[0].status == "not measured"
    assert not (tmp_path / "science" / "R1.png").exists()
    assert "![R1]" not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("R1.json", "{", "not JSON"),
        ("R1.json", json.dumps({"rows": []}), "not a measurement of R1"),
        ("shared.json", json.dumps({"tails": 1}), "not what R4 measures"),
    ],
)
def test_a_broken_file_is_named_and_the_page_stays(name: str, text: str, why: str, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "science.md"
    report.write(results, out, FOUR)
    before = hashes(tmp_path)
    (results / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=why) as raised:
        report.write(results, out, FOUR)
    assert str(results / name) in str(raised.value)
    assert {**hashes(tmp_path), f"results/{name}": ""} == {**before, f"results/{name}": ""}


def test_a_file_of_another_claim_is_named(results: Path, tmp_path: Path) -> None:
    (results / "R2.json").write_bytes((results / "R1.json").read_bytes())
    with pytest.raises(UserError, match=r"R2\.json: holds the results of R1, not of R2"):
        report.write(results, tmp_path / "science.md", FOUR)


def test_without_results_every_claim_is_not_measured(tmp_path: Path) -> None:
    arguments = ["lab", "report", "--results", str(tmp_path / "none"), "--out", str(tmp_path / "science.md"), "--json"]
    document = json.loads(CliRunner().invoke(pairloop, arguments, catch_exceptions=False).stdout)
    assert [(each["id"], each["status"], each["passed"]) for each in document["claims"]] == [
        (name, "not measured", None) for name in CLAIMS
    ]
    text = (tmp_path / "science.md").read_text(encoding="utf-8")
    assert all(f"`{each.command}`" in text for each in CLAIMS.values())
    assert "## The claims: 13 not measured" in text


def test_the_page_in_the_repository_is_that_of_its_results(tmp_path: Path) -> None:
    report.write(DOCS / "results", tmp_path / "science.md")
    assert (tmp_path / "science.md").read_text(encoding="utf-8") == (DOCS / "science.md").read_text(encoding="utf-8"), (
        "run `pairloop lab report`"
    )
    drawn = {path.name for path in (tmp_path / "science").iterdir()}
    assert drawn == {path.name for path in (DOCS / "science").glob("R*.png")}


def test_a_bar_in_a_cell_does_not_break_the_table() -> None:
    assert markdown_table(("a", "b"), [("|o|", "2")]) == "| a | b |\n| --- | --- |\n| \\|o\\| | 2 |"
