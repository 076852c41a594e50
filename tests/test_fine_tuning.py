"""Files and fine-tuning jobs by the official client, unmodified, on a real server; each body by OpenAI's own schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import DefaultHttpxClient, OpenAI
from tests import openai_schema, waiting
from tests.server import POLICY, RunningServer, fake_config

from pairloop.errors import ModelError
from pairloop.formats import snapshot
from pairloop.loop.jobs import reading
from pairloop.store import datasets, doctor, jobs, versions
from pairloop.types import TrainingGroup, Version, VersionKind

ENDED = ("succeeded", "failed", "cancelled")
QUICK = {"min_pairs": 0, "poll": "1s"}


def pair_rows(n: int, **changes: Any) -> bytes:
    """``n`` rows of OpenAI's preference format, of which the fake policy learns; ``changes`` by line number, as ``at_3``."""
    rows = []
    for i in range(n):
        row: dict[str, Any] = {
            "input": {"messages": [{"role": "user", "content": f"Question {i}"}]},
            "preferred_output": [{"role": "assistant", "content": f"answer {90 + i % 10}"}],
            "non_preferred_output": [{"role": "assistant", "content": f"answer {10 + i % 10}"}],
        }
        rows.append(changes.get(f"at_{i + 1}", row))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def server(serve: Callable[..., RunningServer], tmp_path: Any) -> RunningServer:
    return serve(config=fake_config(tmp_path / "server-0", schedule=QUICK), turning=True)


@pytest.fixture
def idle(serve: Callable[..., RunningServer]) -> RunningServer:
    """A server that trains nothing."""
    return serve()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all tests that only send it what it must refuse."""
    with RunningServer(tmp_path_factory.mktemp("shared") / "server") as server:
        yield server


def checked(server: RunningServer) -> OpenAI:
    """The official client; every body it gets is held against OpenAI's schema."""
    http = DefaultHttpxClient(timeout=20.0, trust_env=False, event_hooks={"response": [openai_schema.check]})
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, http_client=http)


def upload(client: OpenAI, content: bytes, name: str = "rows.jsonl") -> str:
    return client.files.create(file=(name, content), purpose="fine-tune").id


def dpo(**hyperparameters: Any) -> Any:
    return {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}


def until(client: OpenAI, job_id: str, holds: Callable[[Any], bool]) -> Any:
    """The job, once ``holds`` of it."""
    job = None

    def held() -> Any:
        nonlocal job
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job if holds(job) else None

    return waiting.until(held, why=lambda: job)


def ended(client: OpenAI, job_id: str) -> Any:
    return until(client, job_id, lambda job: job.status in ENDED)


def told(client: OpenAI, job_id: str) -> list[str]:
    """The job's messages, oldest first."""
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


# --- the whole way


def test_from_rows_to_an_answer_of_the_new_model(server: RunningServer) -> None:
    with checked(server) as client:
        file = client.files.create(file=("pairs.jsonl", pair_rows(64)), purpose="fine-tune")
        assert (file.status, file.filename, file.bytes) == ("processed", "pairs.jsonl", len(pair_rows(64)))
        made = client.fine_tuning.jobs.create(
            training_file=file.id, model=POLICY, method=dpo(n_epochs=2), suffix="our bot", seed=7, metadata={"team": "support"}
        )
        assert made.status in ("validating_files", "queued", "running")
        assert made.hyperparameters.batch_size == "auto"
        job = ended(client, made.id)
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model == f"ft:{POLICY}:pairloop:our-bot:{job.id[-12:]}"
        assert job.method.dpo.hyperparameters.n_epochs == 2
        assert job.method.dpo.hyperparameters.batch_size == job.hyperparameters.batch_size == 16
        assert job.method.dpo.hyperparameters.beta == 0.1
        assert (job.seed, job.trained_tokens > 0, job.finished_at >= job.created_at) == (7, True, True)
        _check_events(client, job)
        checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
        assert [one.step_number for one in checkpoints] == [8, 4]
        assert checkpoints[0].metrics.train_loss is not None
        assert checkpoints[0].metrics.valid_loss is not None
        _check_results(client, job)
        _check_answers(client, server, job.fine_tuned_model, checkpoints[0].fine_tuned_model_checkpoint)
        again = client.fine_tuning.jobs.create(training_file=file.id, model=job.fine_tuned_model, method=dpo())
        assert ended(client, again.id).status == "succeeded"
        listed = client.fine_tuning.jobs.list(limit=1)
        assert [one.id for one in listed.data] == [again.id]
        assert listed.has_more
        assert [one.id for one in client.fine_tuning.jobs.list(metadata={"team": "support"})] == [job.id]
        assert [one.id for one in client.fine_tuning.jobs.list(after=again.id)] == [job.id]
    assert doctor.check(server.store) == []


def _check_events(client: OpenAI, job: Any) -> None:
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    messages = [event.message for event in events]
    assert messages[-1] == f"Created fine-tuning job: {job.id}"
    assert messages[0] == "The job has successfully completed"
    assert any(message.startswith("Files validated: 64 rows") for message in messages)
    metrics: Any = [event.data for event in events if event.type == "metrics"]
    assert {"train_loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= metrics[0].keys()
    first = client.fine_tuning.jobs.list_events(job.id, limit=1)
    assert first.has_more
    assert first.get_next_page().data[0].message == messages[1]


def _check_results(client: OpenAI, job: Any) -> None:
    (file_id,) = job.result_files
    assert client.files.retrieve(file_id).purpose == "fine-tune-results"
    head, *lines = client.files.content(file_id).text.splitlines()
    assert head.startswith("step,train_loss,train_accuracy,valid_loss,valid_accuracy,rewards/chosen")
    assert [line.split(",")[0] for line in lines] == [str(step) for step in range(1, 9)]
    with pytest.raises(openai.BadRequestError, match="purpose") as refused:
        client.fine_tuning.jobs.create(training_file=file_id, model=POLICY, method=dpo())
    assert refused.value.param == "training_file"


def _check_answers(client: OpenAI, server: RunningServer, model: str, checkpoint: str) -> None:
    names = [one.id for one in client.models.list()]
    assert names[0] == POLICY
    assert names[-1] == model
    assert checkpoint not in names
    assert client.models.retrieve(checkpoint).id == checkpoint
    ask: Any = [{"role": "user", "content": "Where is my order?"}]
    chunks = list(client.chat.completions.create(model=model, messages=ask, n=2, stream=True))
    group = server.group(chunks[0].id)
    with server.store.reading() as c:
        named, kept = versions.by_model_name(c, model), versions.by_model_name(c, checkpoint)
    assert named is not None
    assert {completion.version for completion in group.completions} == {named.number}
    assert (group.kind, group.pool) == ("heldout", "gate")
    reply = client.chat.completions.create(model=checkpoint, messages=ask)
    assert kept is not None
    assert server.group(reply.id).completions[0].version == kept.number
    assert [one.id for one in client.chat.completions.list(model=checkpoint)] == [reply.id]


def demonstration(i: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": f"answer {i % 90 + 10}"}]
    }


def test_a_job_without_a_method_is_supervised(server: RunningServer) -> None:
    rows = "".join(json.dumps(demonstration(i)) + "\n" for i in range(64)).encode()
    other = "".join(json.dumps(demonstration(i)) + "\n" for i in range(100, 108)).encode()
    with checked(server) as client:
        file, validation = upload(client, rows), upload(client, other)
        made = client.fine_tuning.jobs.create(training_file=file, validation_file=validation, model=f"{POLICY}@base")
        job = ended(client, made.id)
        assert (job.status, job.method.type) == ("succeeded", "supervised"), job.error
        assert job.method.supervised.hyperparameters.to_dict().keys() == {"batch_size", "learning_rate_multiplier", "n_epochs"}
        assert any(
            message.startswith("Files validated: 64 rows, 64 to train on, 8 held out") for message in told(client, job.id)
        )
        refused = client.fine_tuning.jobs.create(training_file=file, model=POLICY, method=dpo())
        failed = ended(client, refused.id)
        assert (failed.error.code, failed.error.param) == ("unfit_rows", "training_file")
        assert "supervised" in failed.error.message


def test_grpo_on_a_file_of_scored_groups(server: RunningServer) -> None:
    rows = "".join(
        json.dumps(
            {
                "messages": [{"role": "user", "content": f"Question {i}"}],
                "responses": [
                    {"content": f"answer {i % 90 + 10}", "score": i % 90 / 90},
                    {"content": "answer 99", "score": 1.0},
                ],
            }
        )
        + "\n"
        for i in range(64)
    )
    client = server.openai
    method: Any = {"type": "grpo", "grpo": {"hyperparameters": {"n_epochs": 1, "kl_weight": 0.1}}}
    made = client.fine_tuning.jobs.create(training_file=upload(client, rows.encode()), model=POLICY, method=method)
    job = ended(client, made.id)
    assert job.status == "succeeded", job.error
    assert job.hyperparameters.to_dict()["kl_weight"] == 0.1


def test_reinforcement_by_the_configured_verifier(serve: Callable[..., RunningServer], tmp_path: Any) -> None:
    verifier = "tests.loop_rig:score"
    server = serve(config=fake_config(tmp_path / "server-0", schedule=QUICK, label={"verifier": verifier}), turning=True)
    client = server.openai
    rows = "".join(json.dumps({"messages": [{"role": "user", "content": f"Case {i}"}]}) + "\n" for i in range(24))
    grader = {"type": "verifier", "name": verifier}
    method: Any = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": {"group_size": 4}}}
    one, two = upload(client, rows.encode()), upload(client, rows.encode())
    with pytest.raises(openai.BadRequestError, match="leave validation_file out") as refused:
        client.fine_tuning.jobs.create(training_file=one, validation_file=two, model=POLICY, method=method)
    assert refused.value.param == "validation_file"
    made = client.fine_tuning.jobs.create(training_file=upload(client, rows.encode()), model=POLICY, method=method, seed=1)
    job = ended(client, made.id)
    assert job.status == "succeeded", job.error
    assert server.http.get(f"/v1/fine_tuning/jobs/{job.id}").json()["method"]["reinforcement"]["grader"] == grader
    assert any(message.startswith("Sampled and scored 24 prompts") for message in told(client, job.id))
    with server.store.reading() as c:
        stored = jobs.get(c, job.id)
        assert stored is not None
        dataset = datasets.get(c, stored.dataset_id or "")
    assert dataset is not None
    groups = list(snapshot.read_rows(Path(dataset.path) / snapshot.TRAIN_FILE))
    assert {len(group.answers) for group in groups if isinstance(group, TrainingGroup)} == {4}
    assert {group.sampled_by for group in groups} == {0}
    prompts = client.fine_tuning.jobs.create(training_file=upload(client, pair_rows(4)), model=POLICY, method=method)
    assert ended(client, prompts.id).error.code == "invalid_training_file"
    assert doctor.check(server.store) == []


# --- files


def test_files_are_listed_read_and_deleted(idle: RunningServer) -> None:
    with checked(idle) as client:
        ids = [upload(client, pair_rows(n + 1), f"rows-{n}.jsonl") for n in range(3)]
        assert [file.id for file in client.files.list()] == ids[::-1]
        assert [file.id for file in client.files.list(order="asc", limit=2).data] == ids[:2]
        assert [file.id for file in client.files.list(after=ids[2], limit=1).data] == [ids[1]]
        assert [file.id for file in client.files.list(purpose="fine-tune-results")] == []
        assert client.files.content(ids[1]).read() == pair_rows(2)
        assert client.files.delete(ids[1]).deleted
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(ids[1])
        assert [file.id for file in client.files.list()] == [ids[2], ids[0]]


def test_a_file_that_a_job_needs_is_not_deleted(idle: RunningServer) -> None:
    with checked(idle) as client:
        file = upload(client, pair_rows(8))
        job = client.fine_tuning.jobs.create(training_file=file, model=POLICY, method=dpo())
        with pytest.raises(openai.ConflictError, match=job.id):
            client.files.delete(file)
        client.fine_tuning.jobs.cancel(job.id)
        assert client.files.delete(file).deleted
        assert client.fine_tuning.jobs.retrieve(job.id).training_file == file
    assert doctor.check(idle.store) == []


def test_a_file_that_is_no_json_says_so_at_once(idle: RunningServer) -> None:
    file = idle.openai.files.create(file=("a.png", b"\x89PNG\r\n\x1a\n"), purpose="fine-tune")
    assert file.status == "error"
    assert "first row" in (file.status_details or "")


def test_a_file_beyond_the_limit_is_413_and_the_server_answers(serve: Callable[..., RunningServer], tmp_path: Any) -> None:
    server = serve(config=fake_config(tmp_path / "server-0", serve={"max_file_bytes": 1_000}))
    for size in (2_000, 1_200_000):  # within the room for the form, and beyond it
        with pytest.raises(openai.APIStatusError) as refused:
            server.openai.files.create(file=("big.jsonl", b"x" * size), purpose="fine-tune")
        assert refused.value.status_code == 413
        assert "max_file_bytes" in refused.value.message
    assert server.openai.files.create(file=("ok.jsonl", pair_rows(1)), purpose="fine-tune").status == "processed"
    assert list((server.store.artifacts.root / "files").iterdir()) != []
    assert len(list((server.store.artifacts.root / "files").iterdir())) == 1


@pytest.mark.parametrize(
    ("form", "content", "param"),
    [
        ({"purpose": "fine-tune"}, b"", "file"),
        ({"purpose": "assistants"}, b"{}\n", "purpose"),
        ({"purpose": "fine-tune-results"}, b"{}\n", "purpose"),
        ({}, b"{}\n", "purpose"),
        ({"purpose": "fine-tune"}, None, "file"),
        ({"purpose": "fine-tune", "expires_after[anchor]": "created_at"}, b"{}\n", "expires_after[anchor]"),
    ],
)
def test_a_bad_upload_names_its_field(shared: RunningServer, form: dict[str, str], content: bytes | None, param: str) -> None:
    files = None if content is None else {"file": ("rows.jsonl", content)}
    response = shared.http.post("/v1/files", data=form, files=files)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["param"] == param
    assert shared.chat().status_code == 200


# --- what a job refuses


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"training_file": "file-none"}, 404, "training_file"),
        ({"validation_file": "file-none"}, 404, "validation_file"),
        ({"validation_file": "{file}"}, 400, "validation_file"),
        ({"training_file": None}, 400, "training_file"),
        ({"model": None}, 400, "model"),
        ({"model": "gpt-4o-mini"}, 404, "model"),
        ({"model": f"{POLICY}@99"}, 404, "model"),
        ({"model": f"{POLICY}@challenger"}, 404, "model"),
        ({"model": "ft:nobody::x"}, 404, "model"),
        ({"model": "/etc"}, 404, "model"),
        ({"warm_start_from": f"{POLICY}@0"}, 400, "warm_start_from"),
        ({"suffix": "x" * 65}, 400, "suffix"),
        ({"seed": -1}, 400, "seed"),
        ({"metadata": {str(n): "x" for n in range(17)}}, 400, "metadata"),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations"),
        ({"nonsense": 1}, 400, "nonsense"),
        ({"method": {"type": "magic"}}, 400, "method.type"),
        ({"method": {"type": "dpo", "supervised": {}}}, 400, "method.supervised"),
        ({"method": dpo(beta=2.5)}, 400, "method.dpo.hyperparameters.beta"),
        ({"method": dpo(beta=0)}, 400, "method.dpo.hyperparameters.beta"),
        ({"method": dpo(batch_size=257)}, 400, "method.dpo.hyperparameters.batch_size"),
        ({"method": dpo(n_epochs=51)}, 400, "method.dpo.hyperparameters.n_epochs"),
        ({"method": dpo(learning_rate_multiplier=0)}, 400, "method.dpo.hyperparameters.learning_rate_multiplier"),
        ({"method": dpo(kl_weight=1)}, 400, "method.dpo.hyperparameters.kl_weight"),
        ({"method": {"type": "reinforcement"}}, 400, "method.reinforcement.grader"),
        (
            {"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "string_check", "name": "x"}}}},
            400,
            "method.reinforcement.grader.type",
        ),
        ({"method": {"type": "grpo", "grpo": {"verifier": "os:system"}}}, 400, "method.grpo.verifier"),
        (
            {"method": {"type": "grpo", "grpo": {"hyperparameters": {"group_size": 4}}}},
            400,
            "method.grpo.hyperparameters.group_size",
        ),
        ({"method": dpo(), "hyperparameters": {"n_epochs": 1}}, 400, "hyperparameters"),
    ],
)
def test_a_bad_job_names_its_field(shared: RunningServer, changes: dict[str, Any], status: int, param: str) -> None:
    file = upload(shared.openai, pair_rows(4))
    body = {"training_file": file, "model": POLICY, "method": dpo(), **changes}
    body = {key: file if value == "{file}" else value for key, value in body.items() if value is not None}
    response = shared.http.post("/v1/fine_tuning/jobs", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert shared.http.get("/v1/fine_tuning/jobs").json()["data"] == []


@pytest.mark.parametrize("path", ["", "/cancel", "/pause", "/resume", "/events", "/checkpoints"])
def test_an_unknown_job_is_404(shared: RunningServer, path: str) -> None:
    verb = "POST" if path in ("/cancel", "/pause", "/resume") else "GET"
    response = shared.http.request(verb, f"/v1/fine_tuning/jobs/ftjob-none{path}")
    assert (response.status_code, response.json()["error"]["param"]) == (404, "fine_tuning_job_id")


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [("limit=0", 400, "limit"), ("after=ftjob-none", 404, "after"), ("order=up", 400, "order")],
)
def test_a_bad_list_names_its_field(shared: RunningServer, query: str, status: int, param: str) -> None:
    response = shared.http.get(f"/v1/fine_tuning/jobs?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_three_bad_rows_of_ten_thousand_are_told_all_at_once(server: RunningServer) -> None:
    twin = {"prompt": "x", "chosen": "a", "rejected": "a"}
    content = pair_rows(10_000, at_17={"input": {"messages": []}}, at_5000=twin, at_9999=["no", "object"])
    with checked(server) as client:
        job = client.fine_tuning.jobs.create(training_file=upload(client, content, "many.jsonl"), model=POLICY, method=dpo())
        failed = ended(client, job.id)
        assert failed.status == "failed"
        assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
        assert failed.error.message.startswith("3 of 10000 rows were refused (all of them are in file-")
        assert "\nmany.jsonl:17: " in failed.error.message
        assert "many.jsonl:5000:" in failed.error.message
        assert "many.jsonl:9999:" in failed.error.message
        (refused,) = failed.result_files
        rows = [json.loads(line) for line in client.files.content(refused).text.splitlines()]
        assert {row["line"] for row in rows} == {17, 5000, 9999}
        event: Any = client.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
        assert event.level == "error"
        assert {row["line"] for row in event.data["problems"]} == {17, 5000, 9999}


def test_rows_too_few_to_train_on_are_the_users_to_mend(server: RunningServer) -> None:
    client = server.openai
    job = ended(
        client, client.fine_tuning.jobs.create(training_file=upload(client, pair_rows(3)), model=POLICY, method=dpo()).id
    )
    assert (job.status, job.error.code, job.error.param, job.error.kind) == (
        "failed",
        "too_few_rows",
        "training_file",
        "user_error",
    )


def test_a_version_that_cannot_be_read_fails_the_job(server: RunningServer) -> None:
    broken = server.add_version(1)
    (server.folder / "version-1" / "fake.json").write_text("{}")
    client = server.openai
    job = client.fine_tuning.jobs.create(training_file=upload(client, pair_rows(64)), model=broken.name, method=dpo())
    failed = ended(client, job.id)
    assert (failed.status, failed.error.code, failed.error.kind) == ("failed", "bad_model", "user_error")


def test_a_model_of_another_base_says_how_to_serve_it(idle: RunningServer) -> None:
    now = server_time(idle)
    base = Version("other-1234", 0, VersionKind.BASE, "/models/other", "h", None, None, None, now)
    made = Version("other-1234", 1, VersionKind.FULL, "/x", "h1", 0, None, None, now, model_name="ft:other-1234:pairloop::1")
    for version in (base, made):
        idle.store.write(partial(versions.insert, version=version))
    response = idle.chat(model=made.model_name)
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")
    assert "/models/other" in response.json()["error"]["message"]
    assert "pairloop serve" in response.json()["error"]["message"]


def server_time(server: RunningServer) -> Any:
    with server.store.reading() as c:
        return versions.list_(c, POLICY)[0].created_at


def test_what_is_wrong_with_a_model_is_told_also_of_large_files(tmp_path: Path) -> None:
    """They are read in a process of its own, whose errors come back as they are."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(pair_rows(8))
    config = fake_config(tmp_path, policy={"model": str(tmp_path / "no-model"), "method": "lora"})
    order = reading.Order(config, "dpo", reading.Source(str(rows), "rows.jsonl", "training_file"), None, tmp_path)
    with pytest.raises(ModelError, match="no such directory") as here:
        reading.read(order, lambda: False)
    rows.write_bytes(pair_rows(8) + b"\n" * reading.SMALL_BYTES)
    with pytest.raises(ModelError) as there:
        reading.read(order, lambda: False)
    assert str(there.value) == str(here.value)


# --- cancelled, paused, resumed


def test_a_job_that_waits_is_paused_resumed_and_cancelled_once(idle: RunningServer) -> None:
    with checked(idle) as client:
        job = client.fine_tuning.jobs.create(training_file=upload(client, pair_rows(64)), model=POLICY, method=dpo())
        paused = client.fine_tuning.jobs.pause(job.id)
        assert (paused.status, paused.to_dict()["pairloop"]["paused"]) == ("queued", True)  # type: ignore[index]
        with pytest.raises(openai.BadRequestError, match="paused already"):
            client.fine_tuning.jobs.pause(job.id)
        client.fine_tuning.jobs.resume(job.id)
        with pytest.raises(openai.BadRequestError, match="nothing to resume"):
            client.fine_tuning.jobs.resume(job.id)
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        for call in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause):
            with pytest.raises(openai.BadRequestError, match="cancelled already") as refused:
                call(job.id)
            assert refused.value.code == "invalid_state"
        assert told(client, job.id)[-1] == "The job was cancelled"


def test_a_job_is_paused_in_mid_training_and_goes_on(server: RunningServer) -> None:
    client = server.openai
    file = upload(client, pair_rows(400))
    job = client.fine_tuning.jobs.create(training_file=file, model=POLICY, method=dpo(batch_size=1, n_epochs=50))
    running = until(client, job.id, lambda one: one.estimated_finish)
    assert (running.status, running.pairloop["total_steps"]) == ("running", 50 * 348)  # the other rows are held out
    assert running.estimated_finish >= running.created_at
    paused = client.fine_tuning.jobs.pause(job.id)
    assert (paused.status, paused.estimated_finish) == ("queued", None)
    event_seen(client, job.id, "Paused at step")
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"
    client.fine_tuning.jobs.resume(job.id)
    event_seen(client, job.id, "Fine-tuning goes on")
    client.fine_tuning.jobs.cancel(job.id)
    folder = server.config.runs_dir / job.id
    gone(folder)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
    with server.store.reading() as c:
        assert [one.step_number for one in versions.of_job(c, job.id) if one.step_number is None] == []


def event_seen(client: OpenAI, job_id: str, beginning: str) -> None:
    until(client, job_id, lambda _: any(message.startswith(beginning) for message in told(client, job_id)))


def gone(path: Any) -> None:
    waiting.until(lambda: not path.exists(), why=lambda: f"{path} is still there")


# --- the schema check itself


def test_the_schema_check_of_jobs_can_fail(shared: RunningServer) -> None:
    body = shared.http.get("/v1/files").json()
    del body["has_more"]
    with pytest.raises(Exception, match="has_more"):
        openai_schema.validate("ListFilesResponse", body)
