"""Training runs on their pages: of cycles and of fine-tuning jobs, live and ended; and metrics files too long to read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server import POLICY, RunningServer, fake_config
from tests.test_fine_tuning import QUICK, dpo, ended, pair_rows, upload
from tests.test_pages import EVIL, Collector

from pairloop.learner.reading import sample_rows
from pairloop.store import cycles, datasets, jobs, runs, versions
from pairloop.store.jobs import JobStatus
from pairloop.types import Cycle, CycleState, CycleStep, Dataset, Run, RunStatus, Version, VersionKind

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Twenty-eight cycles: the newest trains, the one before succeeded, the one before that failed."""
    with RunningServer(tmp_path_factory.mktemp("runs") / "server") as server:
        for number in range(1, 29):
            live, failed = number == 28, number == 26
            result: dict[str, Any] = {
                "steps": 40,
                "steps_planned": 60,
                "stopped_because": "ess",
                "stop_message": f"it ran {EVIL}",
            }
            result |= {"warnings": [f"beware {EVIL}"], "metrics": {"ess_mean": 0.7, "ess_min": 0.4}, "wall_s": 75.0}
            put(server, number, RunStatus.RUNNING if live else RunStatus.USER_ERROR if failed else RunStatus.SUCCEEDED, result)
        yield server


def put(server: RunningServer, number: int, status: RunStatus, result: dict[str, Any]) -> None:
    began = NOW - timedelta(hours=40 - number)
    state = CycleState.TRAINING if status is RunStatus.RUNNING else CycleState.HELD
    steps = (CycleStep(CycleState.BUILDING, {}, began), CycleStep(state, {}, began))
    cycle = Cycle(f"cycle_{number}", POLICY, number, 0, "test", began, steps)
    dataset = Dataset(f"dataset_{number}", POLICY, str(server.folder / "none"), 700 + number, 10, {}, {}, began)
    is_live, failed = status is RunStatus.RUNNING, status is RunStatus.USER_ERROR
    run = Run(
        run_id=f"run_{number}",
        policy=POLICY,
        cycle_id=cycle.cycle_id,
        dataset_id=dataset.dataset_id,
        parent=0,
        status=status,
        owner="elsewhere:1",
        attempt=1,
        lease_expires_at=began,
        heartbeat_at=began + timedelta(seconds=75),
        progress={"step": 12, "of": 60},
        result={} if is_live or failed else result,
        error=f"the disk is full {EVIL}" if failed else None,
        created_at=began,
    )

    def write(c: Any) -> None:
        cycles.insert(c, cycle)
        datasets.insert(c, dataset, feedback_seq=0, cycle_id=cycle.cycle_id, pairs=())
        runs.insert(c, run)
        if status is RunStatus.SUCCEEDED:
            record = {"recipe": {"train": {"beta": 0.1, "stop_ess": 0.5}, "method": "full"}}
            versions.insert(
                c,
                Version(
                    POLICY,
                    number,
                    VersionKind.FULL,
                    "none",
                    f"h{number}",
                    0,
                    dataset.dataset_id,
                    run.run_id,
                    began,
                    record=record,
                ),
            )

    server.store.write(write)
    if number in (27, 28):
        metrics(server.config.runs_dir / run.run_id, 40 if number == 27 else 12)


def metrics(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {
            "step": step,
            "of": 60,
            "loss": 0.69 - step / 1000,
            "accuracy": 0.4,
            "usable": 0.5,
            "margin": step / 100,
            "lr": 1e-5,
        }
        row |= {
            "d_chosen": step / 10,
            "d_rejected": -step / 10,
            "ess": 1 - step / 100,
            "kl": 0.1,
            "grad_norm": None,
            "tokens_per_s": 900.5,
        }
        rows.append(row)
    rows.append({"step": steps, "of": 60, "heldout": {"loss": 0.6, "accuracy": 0.7, "margin": 0.3, "usable": 1.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "child.log").write_text("first line\n" * 3_000 + f"last words {EVIL}\n", encoding="utf-8")


def text_of(server: RunningServer, path: str, status: int = 200) -> str:
    reply = server.http.get(path)
    assert reply.status_code == status, reply.text
    assert EVIL not in reply.text
    return reply.text


def plots_of(page: str) -> list[str]:
    return [str(attributes["data-plot"]) for tag, attributes in Collector(page).tags if tag == "figure"]


def test_the_list_says_how_each_run_ended_and_pages(server: RunningServer) -> None:
    page = text_of(server, "/runs")
    assert page.count('<th scope="row">') == 25
    for words in (
        "12 of 60",
        "40 of 60",
        "it ran &lt;script&gt;",
        "the disk is full &lt;script&gt;",
        "It has not stopped.",
        "1 min 15 s",
    ):
        assert words in page
    assert "loop:tick" in page  # one is live
    assert 'href="/runs?of=cycles&amp;after=run_4">Older' in page
    older = text_of(server, "/runs?after=run_4")
    assert older.count('<th scope="row">') == 3
    assert "loop:tick" not in older
    assert "There is no fine-tuning job" in text_of(server, "/runs?of=jobs")


def test_a_run_that_ended_says_why_with_its_figures_settings_and_log(server: RunningServer) -> None:
    page = text_of(server, "/runs/run_27")
    for words in (
        "it ran &lt;script&gt;",
        "beware &lt;script&gt;",
        "0.7 · 0.4",
        "727 rows",
        "last words &lt;script&gt;",
        "train.stop_ess",
    ):
        assert words in page
    for link in ("/versions/27", "/versions/0", "/gates/27", "/datasets/dataset_27", "/runs/run_27?with=run_26"):
        assert f'href="{link}"' in page
    assert "loop:tick" not in page
    assert "stops below 0.5" in page
    names = ["loss", "margin", "accuracy", "displacement", "ess", "kl", "learning-rate", "tokens-per-second"]
    assert plots_of(page) == [f"run_27-{name}" for name in names]  # a norm that was never finite is no plot
    assert "step 40: held out 0.6" in page
    assert "step 1: training 0.8" in page  # the accuracy of the rows that compare: .4 of .5
    assert page.count("first line") < 2_000


def test_a_live_run_looks_again_and_has_no_end_yet(server: RunningServer) -> None:
    page = text_of(server, "/runs/run_28")
    assert 'hx-trigger="loop:tick from:body throttle:3s, loop:moved from:body"' in page
    assert "It has not stopped." in page
    assert '<progress value="12" max="60"' in page
    assert "last heard of" in page


def test_runs_are_compared_as_one_line_each(server: RunningServer) -> None:
    page = text_of(server, "/runs/run_27?with=run_28&with=run_26")
    assert "Training of cycle 28: training" in page
    assert 'href="/runs/run_27?with=run_26" aria-current' in page  # without the other one
    assert "Training of cycle 26: The metrics file of this run, which elsewhere:1 trained, is not on this machine" in page
    assert len(plots_of(page)) == 8


@pytest.mark.parametrize(
    ("path", "status", "name"),
    [
        ("/runs/run_99", 404, "run_99"),
        ("/runs/run_27?with=run_99", 404, "run_99"),
        ("/runs/run_27?with=a&with=b&with=c&with=d", 400, "with"),
        ("/runs/run_27?with=run_27", 400, "with"),
        ("/runs?of=men", 400, "of"),
        ("/runs?after=run_99", 404, "run_99"),
    ],
)
def test_a_bad_parameter_is_named(server: RunningServer, path: str, status: int, name: str) -> None:
    assert name in text_of(server, path, status)


def test_fine_tuning_jobs_have_the_same_page_and_can_be_paused_and_cancelled(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "jobs", config=fake_config(tmp_path / "jobs", schedule=QUICK), turning=True) as server:
        client = server.openai
        made = client.fine_tuning.jobs.create(model=POLICY, training_file=upload(client, pair_rows(64)), method=dpo())
        job_id = ended(client, made.id).id
        with server.store.reading() as c:
            job = jobs.get(c, job_id)
        assert job is not None
        page = text_of(server, f"/runs/{job_id}")
        assert "all passes done" in page
        assert [name.removeprefix(f"{job_id}-") for name in plots_of(page)][:3] == ["loss", "margin", "accuracy"]
        assert "/pause" not in page
        other = replace(
            job, job_id="ftjob-paused", status=JobStatus.QUEUED, paused=True, fine_tuned_model=None, finished_at=None
        )
        server.store.write(lambda c: jobs.insert(c, other))
        paused = text_of(server, "/runs/ftjob-paused")
        assert 'data-api="POST /v1/fine_tuning/jobs/ftjob-paused/resume"' in paused
        assert 'data-api="POST /v1/fine_tuning/jobs/ftjob-paused/cancel" data-confirm="cancel"' in paused
        assert "It is paused" in paused
        assert server.http.post("/v1/fine_tuning/jobs/ftjob-paused/cancel", json={}).status_code == 200
        assert "It was cancelled." in text_of(server, "/runs/ftjob-paused")
        assert text_of(server, "/runs?of=jobs").count('<th scope="row">') == 2


# --- long metrics files


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 300), max_size=80), st.integers(1, 2_000), st.integers(1, 30), st.integers(0, 500), st.booleans()
)
def test_what_is_read_of_a_metrics_file_are_rows_of_it_in_their_order(
    tmp_path: Path, sizes: list[int], whole: int, samples: int, end: int, torn: bool
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "of": 80, "pad": "x" * size}) + "\n" for step, size in enumerate(sizes, start=1)]
    path.write_text("".join(lines) + ('{"step": 99, "o' if torn else ""), encoding="utf-8")
    found = sample_rows(path, whole=whole, samples=samples, end=end)
    steps = [row["step"] for row in found.rows]
    assert steps == sorted(set(steps))
    assert all(len(row["pad"]) == sizes[row["step"] - 1] for row in found.rows)
    assert found.is_whole == (path.stat().st_size <= whole)
    if found.is_whole:
        assert steps == list(range(1, len(sizes) + 1))
    elif sizes:
        assert steps[0] == 1
        assert len(steps) <= samples + 1 + end // 25


def test_a_long_file_is_read_in_a_moment_and_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, "of": 60_000, "loss": 0.5}) + "\n" for step in range(1, 60_001))
    found = sample_rows(path)
    steps = [row["step"] for row in found.rows]
    assert not found.is_whole
    assert (steps[0], steps[-1]) == (1, 60_000)
    assert len(steps) < 4_000
    assert max(b - a for a, b in itertools.pairwise(steps)) < 60_000 / 300
    assert sample_rows(tmp_path / "none.jsonl").rows == []
