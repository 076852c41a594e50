"""jobs: fine-tuning jobs, as over the API, against the store directly. A server or `pairloop worker` trains them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import config_option, show, table, verb
from pairloop.cli.verbs import Verbs

if TYPE_CHECKING:
    from pairloop.config import Config
    from pairloop.loop.jobs import JobRequest
    from pairloop.store import Store
    from pairloop.store.jobs import Job

_job_id = click.argument("job_id")


@click.group(cls=Verbs)
def jobs() -> None:
    """Create and look at fine-tuning jobs."""


@jobs.command("list")
@config_option
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="Newest jobs to show.")
@verb
def jobs_list(config_path: Path, limit: int, as_json: bool) -> None:
    """Jobs, newest first."""
    from pairloop.cli.opening import open_store
    from pairloop.store import jobs as rows

    with open_store(config_path) as (_, store), store.reading() as c:
        found = list(islice(rows.walk(c), limit))
    headers = ("job", "status", "method", "starts from", "step", "model")
    lines = [
        (one.job_id, _status(one), one.method["type"], f"{one.policy}@{one.parent}", _step(one), one.fine_tuned_model)
        for one in found
    ]
    show({"jobs": found}, table(headers, lines) if lines else "no job yet", as_json=as_json)


@jobs.command("show")
@_job_id
@config_option
@verb
def jobs_show(job_id: str, config_path: Path, as_json: bool) -> None:
    """One job: how it stands, what it starts from, its numbers, and why it failed where it did."""
    from pairloop.cli.opening import open_store
    from pairloop.loop import jobs as room

    with open_store(config_path) as (_, store), store.reading() as c:
        job = room.get(c, job_id)
    show(job, _text(job), as_json=as_json)


@jobs.command("create")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@config_option
@click.option("--model", help="Policy name, name@version, ft: model, model directory or hub id; by default the champion.")
@click.option("--validation-file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Rows to measure on.")
@click.option("--method", default="supervised", show_default=True, help="supervised, dpo, grpo, or another objective.")
@click.option("--suffix", help="Part of the new model's name.")
@click.option("--train-seed", "seed", type=int, help="Names the order of the rows.")
@click.option("--beta", type=float, help="How strongly a margin is asked for, up to 2.")
@click.option("--batch-size", type=int, help="Rows per optimizer step, up to 256.")
@click.option("--epochs", "n_epochs", type=int, help="Passes over the rows, up to 50.")
@click.option("--learning-rate-multiplier", type=float, help="Of train.learning_rate.")
@click.option("--verifier", help="The configured label.verifier: sampled answers are scored by it (grpo and its kin).")
@verb
def jobs_create(
    file: Path,
    config_path: Path,
    model: str | None,
    validation_file: Path | None,
    method: str,
    suffix: str | None,
    seed: int | None,
    verifier: str | None,
    as_json: bool,
    **numbers: Any,
) -> None:
    """Put FILE's rows and a job that trains on them into the store. The server or `pairloop worker` does the rest."""
    from pairloop.cli.opening import open_store
    from pairloop.loop import jobs as room
    from pairloop.loop.cycle import register_base

    options: dict[str, Any] = {"hyperparameters": {name: value for name, value in numbers.items() if value is not None}}
    if verifier is not None:
        options["verifier"] = verifier
    with open_store(config_path) as (config, store):
        body = {
            "model": model or config.policy.name,
            "suffix": suffix,
            "seed": seed,
            "method": {"type": method, method: options},
        }
        register_base(store, config)
        first = _request({**body, "training_file": "checked-first"})
        with store.reading() as c:
            room.find_start(c, config, first.start)  # before the file is copied
        body["training_file"] = _upload(store, config, file)
        body["validation_file"] = None if validation_file is None else _upload(store, config, validation_file)
        job = room.create(store, config, _request(body))
    show(job, f"{job.job_id}: {_status(job)}", as_json=as_json)


@jobs.command("cancel")
@_job_id
@config_option
@verb
def jobs_cancel(job_id: str, config_path: Path, as_json: bool) -> None:
    """End a job now."""
    _change("cancel", job_id, config_path, as_json=as_json)


@jobs.command("pause")
@_job_id
@config_option
@verb
def jobs_pause(job_id: str, config_path: Path, as_json: bool) -> None:
    """Stop a job at its next step; it shows queued."""
    _change("pause", job_id, config_path, as_json=as_json)


@jobs.command("resume")
@_job_id
@config_option
@verb
def jobs_resume(job_id: str, config_path: Path, as_json: bool) -> None:
    """Put a paused job back into the queue; it goes on where it was."""
    _change("resume", job_id, config_path, as_json=as_json)


@jobs.command("events")
@_job_id
@config_option
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="Newest events to show.")
@verb
def jobs_events(job_id: str, config_path: Path, limit: int, as_json: bool) -> None:
    """What happened to a job, newest first."""
    from pairloop.cli.opening import open_store
    from pairloop.loop import jobs as room
    from pairloop.store import jobs as rows

    with open_store(config_path) as (_, store), store.reading() as c:
        found = rows.events(c, room.get(c, job_id).job_id, limit=limit)
    lines = [(f"{one.created_at:%Y-%m-%d %H:%M:%S}", one.level, one.message) for one in found]
    show({"events": found}, table(("time (UTC)", "level", "event"), lines), as_json=as_json)


def _change(what: str, job_id: str, config_path: Path, *, as_json: bool) -> None:
    from pairloop.cli.opening import open_store
    from pairloop.loop import jobs as room

    act = {"cancel": room.cancel, "pause": room.pause, "resume": room.resume}[what]
    with open_store(config_path) as (_, store):
        job = act(store, job_id)
    show(job, f"{job.job_id}: {_status(job)}", as_json=as_json)


def _request(body: dict[str, Any]) -> JobRequest:
    """The checked request; UserError that names the field which is wrong."""
    from pydantic import ValidationError

    from pairloop.errors import UserError
    from pairloop.loop.jobs import JobRequest

    try:
        return JobRequest.model_validate(body)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or str(problem.get("ctx", {}).get("param", "job"))
        raise UserError(f"{place}: {problem['msg']}") from error


def _upload(store: Store, config: Config, path: Path) -> str:
    from pairloop.loop import jobs as room

    with path.open("rb") as source:
        return room.upload(store, config, source, filename=path.name, purpose="fine-tune").file_id


def _status(job: Job) -> str:
    return f"{job.status} (paused)" if job.paused else str(job.status)


def _step(job: Job) -> str | None:
    return f"{job.progress['step']}/{job.progress['of']}" if "of" in job.progress else None


def _text(job: Job) -> str:
    numbers = job.method[job.method["type"]]["hyperparameters"]
    rows = [
        ("status", _status(job)),
        ("starts from", f"{job.policy}@{job.parent}"),
        ("method", f"{job.method['type']}, " + ", ".join(f"{name} {value}" for name, value in numbers.items())),
        ("step", _step(job)),
        ("model", job.fine_tuned_model),
        ("trained tokens", job.trained_tokens),
        ("result files", ", ".join(job.result_files) or None),
        ("failed because", None if job.error is None else f"{job.error['code']} ({job.error['kind']}): {job.error['message']}"),
    ]
    return f"{job.job_id}\n" + table(("", ""), [row for row in rows if row[1] is not None])


COMMANDS = (jobs,)
