"""The benchmark's own arithmetic, and one real race."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tests.server import RunningServer
from torch.utils.flop_counter import FlopCounterMode

from pairloop.bench import cells, flops, gateway, gateway_report, load, race, report, training
from pairloop.bench.cells import SAMPLE_CELLS, TRAIN_CELLS, Pair, Shape
from pairloop.bench.models import words, write_model
from pairloop.bench.race import Outcome, Turn
from pairloop.bench.settings import Settings
from pairloop.bench.trl import row
from pairloop.cli import pairloop
from pairloop.errors import InvalidRequestError, SystemFailure
from pairloop.policy.scoring import completion_logps, load_causal_lm

TINY = Shape("tiny", hidden=16, layers=2, mlp=32, heads=4, kv_heads=2, vocab=40, head_dim=8)


def turn(units: int, cpu_s: float, wall_s: float = 1.0) -> Turn:
    return Turn(units, cpu_s, wall_s, peak_mb=100.0, net_mb=50.0)


# ---- what is measured


@pytest.mark.parametrize("name", TRAIN_CELLS)
def test_the_pairs_of_a_cell_are_what_its_table_says(name: str) -> None:
    cell = TRAIN_CELLS[name]
    found = cells.pairs(cell, 40)
    assert found == cells.pairs(cell, 40)
    assert {len(pair.prompt) for pair in found} == {cell.shared + cell.prompt}
    assert len({pair.prompt[: cell.shared] for pair in found}) == 1
    assert len({pair.prompt for pair in found}) == 40
    answers = [answer for pair in found for answer in (pair.chosen, pair.rejected)]
    assert all(64 <= len(answer) <= 128 and answer.index(cells.EOS_ID) == len(answer) - 1 for answer in answers)
    assert max(max(answer) for answer in answers) < cell.shape.vocab


def test_cells_are_chosen_by_name_and_else_by_device() -> None:
    assert [cell.name for cell in cells.chosen(TRAIN_CELLS, "M6-S2,M6-S1", "cpu")] == ["M6-S2", "M6-S1"]
    assert {cell.shape.name for cell in cells.chosen(TRAIN_CELLS, None, "cpu")} == {"M6", "M50"}
    assert {cell.shape.name for cell in cells.chosen(SAMPLE_CELLS, None, "cuda")} == {"B1"}
    with pytest.raises(InvalidRequestError, match="no cell M7: there are M6-S1"):
        cells.chosen(TRAIN_CELLS, "M6-S1,M7", "cpu")


def test_every_contestant_reads_the_same_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(write_model(tmp_path / "m", TINY))
    pair = Pair((3, 39, 1), (7, 8, 0), (9, 0))
    texts = row(pair)
    read = [tokenizer(texts["prompt"] + texts[side] + tokenizer.eos_token)["input_ids"] for side in ("chosen", "rejected")]
    assert read == [[*pair.prompt, *pair.chosen], [*pair.prompt, *pair.rejected]]
    assert tokenizer(words(pair.prompt))["input_ids"] == list(pair.prompt)


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    """Matrix products of the packed pass, forward and backward; attention is counted by hand, as blocks are filled up."""
    model = load_causal_lm(write_model(tmp_path / "m", TINY), trainable=True)
    found = [Pair((5, 6, 7, 8), (1, 2, 3, 0), (4, 0)), Pair((9, 10, 11), (12, 13, 0), (14, 15, 16, 0))]
    prompts = [pair.prompt for pair in found for _ in range(2)]
    with FlopCounterMode(display=False) as counter:
        logp_NT, _ = completion_logps(model, prompts, [answer for pair in found for answer in (pair.chosen, pair.rejected)])
        logp_NT.sum().backward()  # type: ignore[no-untyped-call]
    products = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in products.items() if "mm" in str(op) and "bmm" not in str(op))
    seen = sum(
        n * before + n * (n + 1) / 2
        for pair in found
        for n, before in (
            (len(pair.prompt), 0),
            (len(pair.chosen) - 1, len(pair.prompt)),
            (len(pair.rejected) - 1, len(pair.prompt)),
        )
    )
    attention = 3 * 4 * TINY.layers * TINY.heads * TINY.head_dim * seen
    assert flops.step_flops(TINY, found, "full") - attention == counted


def test_a_shared_beginning_is_counted_once() -> None:
    alone = [Pair((1, 2, 3, 4), (5, 0), (6, 0))]
    both = [*alone, Pair((1, 2, 3, 7), (5, 0), (6, 0))]
    assert (
        flops.step_flops(TINY, alone, "full") < flops.step_flops(TINY, both, "full") < 2 * flops.step_flops(TINY, alone, "full")
    )
    assert flops.step_flops(TINY, both, "lora") == flops.step_flops(TINY, both, "full") * 2 / 3
    assert flops.ceiling(torch.device("cpu")) > 1e8


# ---- the race


HOLDER = """
import sys
from pairloop.bench.pacing import Pacer
pacer = Pacer(sys.stdin, sys.stdout)
more, held = pacer.ready(tokens=3), []
while more:
    held.append(b"x" * 40_000_000)
    more = pacer.step(4)
"""


def test_the_pacer_reports_each_turn_and_ends_with_the_input() -> None:
    # In a process of its own, which holds nothing that others gave back.
    commands = '{"steps": 2}\n{"steps": 1}\n'
    done = subprocess.run(
        [sys.executable, "-c", HOLDER], input=commands, capture_output=True, text=True, timeout=60, check=True
    )
    facts, first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert facts == {"tokens": 3}
    assert (first["units"], second["units"]) == (8, 4)
    assert first["net_mb"] > 70
    assert second["net_mb"] > first["net_mb"] + 30
    assert first["cpu_s"] > 0


def test_ratios_are_taken_turn_by_turn() -> None:
    ours = Outcome(turns=[turn(10, 1.0), turn(10, 4.0)])
    peer = Outcome(turns=[turn(10, 3.0), turn(10, 4.0)])
    assert race.ratios(ours, peer, "cpu") == pytest.approx({"min": 1.0, "median": 2.0, "max": 3.0})
    assert race.ratios(ours, peer, "cpu", extra=0.1) == pytest.approx({"min": 1.25, "median": 2.625, "max": 4.0})
    assert race.ratios(ours, peer, "cuda") == pytest.approx({"min": 1.0, "median": 1.0, "max": 1.0})


def test_other_data_is_refused() -> None:
    outcomes = {name: Outcome({"tokens_per_pair": n}) for name, n in (("pairloop", 200.0), ("trl_best", 190.0))}
    with pytest.raises(SystemFailure, match=r"read different data.*190"):
        training._refuse_other_data(outcomes)


@pytest.mark.slow
def test_a_contestant_that_fails_ends_the_race_with_its_reason(tmp_path: Path) -> None:
    spec = {
        "contestant": "pairloop_sample",
        "cell": "M6-32",
        "device": "cpu",
        "threads": 1,
        "dtype": "float32",
        "model": "nowhere",
    }
    with pytest.raises(SystemFailure, match=r"lost: nowhere: config.json is missing"):
        race.race({"lost": spec}, tmp_path, rounds=1, steps=1, threads=1, on_step=lambda *_: None, title="")


# ---- what it leaves


def test_the_report_holds_every_figure_and_its_spread(tmp_path: Path) -> None:
    ratio = {"min": 2.5, "median": 3.25, "max": 4.125}
    figures = {"pairs_per_cpu_s": 12.34, "spread": ratio, "net_mb": 321.0, "memory_ratio": 0.5, "ratio": ratio}
    cell = {"cell": "M6-S1", "mode": "full", "pairloop": figures | {"flop_use": 0.25}}
    tried = [{"change": "float32", "pairs_per_s": 1.5, "kept": False}, {"change": "hub kernels", "refused": "no kernels"}]
    peers = {"trl_default": figures, "trl_best": figures | {"tried": tried}}
    found = report.document(Settings(tmp_path, lambda *_: None), cells=[cell | {"peers": peers}])
    files = report.write(found, tmp_path / "out")
    assert [path.name for path in files] == ["bench.json", "bench.md", "bench.png"]
    page = (tmp_path / "out" / "bench.md").read_text()
    assert "| M6-S1 | full | 12.3 | 25 % | 12.3 | 3.25 [2.50, 4.12] |" in page
    assert "| M6-S1 | full | float32 | 1.5 pairs/s, dropped |" in page
    assert "| M6-S1 | full | hub kernels | does not run: no kernels |" in page
    assert f"torch {torch.__version__.split('+')[0]}" in page
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == found
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_said_before_anything_runs(tmp_path: Path) -> None:
    runner = CliRunner()
    told = runner.invoke(pairloop, ["bench", "train", "--cells", "M7-S1", "--out", str(tmp_path)])
    assert told.exit_code == 2
    assert "no cell M7-S1" in told.output
    told = runner.invoke(pairloop, ["bench", "--quick", "train"])
    assert told.exit_code == 2
    assert "behind the subcommand" in told.output
    if not torch.cuda.is_available():
        told = runner.invoke(pairloop, ["bench", "sample", "--device", "cuda", "--out", str(tmp_path)])
        assert told.exit_code == 2
        assert "no CUDA device" in told.output


@pytest.mark.slow
def test_training_and_sampling_run_beside_their_peers(tmp_path: Path) -> None:
    def bench(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "pairloop", "bench", *arguments, "--quick", "--json", "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-2_000:]
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    (cell,) = bench("train", "--cells", "M6-S1", "--mode", "lora")["cells"]
    assert (cell["cell"], cell["mode"]) == ("M6-S1", "lora")
    assert {"pairs_per_cpu_s", "peak_mb"} <= cell["pairloop"].keys()
    assert cell["peers"].keys() == {"trl_default", "trl_best"}
    assert all(peer["ratio"].keys() == {"min", "median", "max"} for peer in cell["peers"].values())
    assert cell["peers"]["trl_best"]["settings"]
    (cell,) = bench("sample", "--cells", "M6-32")["sampling"]
    assert cell["peers"]["generate"]["ratio"]["median"] > 0


# ---- the gateway


@pytest.mark.slow
def test_the_gateway_is_measured_beside_a_bare_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real servers, few requests: the figures are there, ours is the slower one, and the tables hold them."""
    monkeypatch.setattr(gateway, "REQUESTS", {1: 40, 16: 160})
    monkeypatch.setattr(gateway, "COMMITS", 5)
    found = gateway.bench(Settings(tmp_path, lambda *_: None, quick=True), soak=40)
    assert [(cell["kind"], cell["clients"]) for cell in found["cells"]] == [
        ("whole", 1), ("whole", 16), ("stream", 1), ("stream", 16),
    ]  # fmt: skip
    for cell in found["cells"]:
        assert cell["pairloop"]["p50_ms"]["median"] > cell["bare"]["p50_ms"]["median"] > 0
        assert cell["pairloop"]["cpu_ms"]["median"] >= 0
    assert [row["requests"] for row in found["memory"]] == list(range(0, 41, 4))
    assert found["commit_ms"]["median"] > 0
    section = gateway_report.section({"measured_at": "now", "device": "here", "gateway": found})
    assert section[1] == "## Gateway"
    assert sum(line.startswith("| stream |") for line in section) == 2


def test_a_load_stops_at_a_reply_that_is_no_success(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "server") as server:
        bad = load.request_bytes(server.url, {"model": "nobody"})
        with pytest.raises(SystemFailure, match="a request of the benchmark was answered"):
            load.run(server.url, [bad], 1)
