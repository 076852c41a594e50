"""Training runs, of cycles and of fine-tuning jobs: how far each is, its figures step by step, why it stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response

from pairloop.errors import InvalidRequestError
from pairloop.loop import jobs
from pairloop.loop.jobs import Figures, TrainingRun
from pairloop.web.context import Context, Here
from pairloop.web.pages.rendering import PageRoute, page
from pairloop.web.plots import Drawing, Plot, Point, Series, Tone, draw, thinned

ON_A_PAGE = 25
COMPARED = 3
"""Runs that one may be compared with at once."""
TO_CHOOSE_FROM = 12
DRAWN = 120
"""Points of a line: ten plots are drawn anew every few seconds while a run is live."""
HEIGHT = 170.0

TONES: tuple[Tone, ...] = ("accent", "warn", "good", "bad")
STOPS: Mapping[str, str] = {
    "": "It did not say why.",
    "completed": "All passes over the data are done.",
    "cancelled": "It was cancelled.",
    "too_few_pairs": "There were too few usable rows to train on.",
}
"""What the runs of earlier versions of pairloop have no sentence for."""

RunId = Annotated[str, Path(max_length=128)]
After = Annotated[str | None, Query(max_length=128)]

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@dataclass(frozen=True, slots=True)
class Metric:
    """A plot: ``lines`` are (key of the row, word), the second one dashed."""

    id: str
    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    percent: bool = False
    marks: tuple[tuple[str, str], ...] = ()
    """Keys of the configuration whose value is drawn as a line, with their words."""


METRICS = (
    Metric("loss", "Loss", "nats", (("loss", "training"), ("heldout_loss", "held out"))),
    Metric("margin", "Reward margin", "beta · h", (("margin", "training"), ("heldout_margin", "held out"))),
    Metric("accuracy", "Accuracy", "share", (("accuracy", "training"), ("heldout_accuracy", "held out")), percent=True),
    Metric("displacement", "d⁺ and d⁻", "nats per answer", (("d_chosen", "d⁺, chosen"), ("d_rejected", "d⁻, rejected"))),
    Metric(
        "ess",
        "Effective sample size",
        "ESS",
        (("ess", "training"),),
        marks=(("train.stop_ess", "stops below"), ("train.warn_ess", "warns below")),
    ),
    Metric("kl", "KL to what sampled the rows", "nats per answer", (("kl", "training"),)),
    Metric("grad-norm", "Gradient norm, before clipping", "norm", (("grad_norm", "training"),)),
    Metric("learning-rate", "Learning rate", "rate", (("lr", "training"),)),
    Metric("tokens-per-second", "Tokens per second", "tokens/s", (("tokens_per_s", "training"),)),
)


@dataclass(frozen=True, slots=True)
class Shown:
    """A run of the plots: itself, its figures, the link that leaves it out."""

    run: TrainingRun
    figures: Figures
    tone: Tone
    without: str


@dataclass(frozen=True, slots=True)
class _Read:
    """All that the page of a run shows."""

    run: TrainingRun
    others: list[TrainingRun]
    shown: list[tuple[TrainingRun, Figures]]
    recipe: dict[str, Any]
    log: str
    rows: int | None


@router.get("/runs")
async def runs(request: Request, context: Here, of: Literal["cycles", "jobs"] = "cycles", after: After = None) -> Response:
    found = await asyncio.to_thread(_listed, context, of, after)
    lines = found[:ON_A_PAGE]
    return page(
        request,
        context,
        "runs.html",
        title="Training",
        runs=lines,
        of=of,
        after=after,
        older=lines[-1].run_id if len(found) > ON_A_PAGE else None,
        why=why,
        length=length,
        is_live=any(run.is_live for run in lines),
    )


@router.get("/runs/{run_id}")
async def run_of(
    run_id: RunId, request: Request, context: Here, with_: Annotated[list[str] | None, Query(alias="with")] = None
) -> Response:
    wanted = list(dict.fromkeys(with_ or ()))
    if len(wanted) > COMPARED or run_id in wanted:
        raise InvalidRequestError(f"with names up to {COMPARED} other runs", param="with")
    read = await asyncio.to_thread(_read, context, run_id, wanted)
    run = read.run
    shown = [
        Shown(one, figures, tone, _link(run_id, [name for name in wanted if name != one.run_id]))
        for (one, figures), tone in zip(read.shown, TONES, strict=False)
    ]
    return page(
        request,
        context,
        "run.html",
        title=title_of(run),
        run=run,
        shown=shown,
        figures=shown[0].figures,
        drawings=list(_drawings(shown, read.recipe)),
        others=[(one, _link(run_id, [*wanted, one.run_id])) for one in read.others if one.run_id not in wanted],
        can_add=len(wanted) < COMPARED,
        here=_link(run_id, wanted),
        recipe=read.recipe,
        log=read.log,
        rows=read.rows,
        why=why(run),
        length=length(run),
        result=run.result,
        title_of=title_of,
    )


def title_of(run: TrainingRun) -> str:
    if run.kind == "job":
        return f"Fine-tuning job {run.run_id}"
    attempt = f", attempt {run.attempt}" if run.attempt > 1 else ""
    return f"Training of cycle {run.cycle}{attempt}" if run.cycle is not None else f"Training run {run.run_id}"


def why(run: TrainingRun) -> str:
    """Why it stopped, or that it has not."""
    if run.error:
        return run.error
    if run.is_paused:
        return "It is paused, and goes on from its last checkpoint when it is resumed."
    if run.is_live:
        return "It has not stopped."
    return run.stop_message or STOPS.get(run.stopped_because, run.stopped_because)


def length(run: TrainingRun) -> str:
    """How long it took, in two units at most."""
    seconds = run.seconds
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _listed(context: Context, of: str, after: str | None) -> list[TrainingRun]:
    """A page of them and one more, where there is one."""
    of_which = jobs.of_jobs if of == "jobs" else jobs.of_cycles
    with context.store.reading() as c:
        return of_which(c, context.config, ON_A_PAGE + 1, after=after)


def _read(context: Context, run_id: str, wanted: Sequence[str]) -> _Read:
    with context.store.reading() as c:
        run = jobs.find(c, context.config, run_id)
        chosen = [run, *(jobs.find(c, context.config, name, param="with") for name in wanted)]
        of_which = jobs.of_jobs if run.kind == "job" else jobs.of_cycles
        others = [one for one in of_which(c, context.config, TO_CHOOSE_FROM) if one.run_id != run_id]
        recipe, rows = jobs.recipe_of(c, run), jobs.rows_trained_on(c, run)
    shown = [(one, jobs.figures(context.store, one)) for one in chosen]
    return _Read(run, others, shown, recipe, jobs.log_of(run), rows)


def _link(run_id: str, wanted: Sequence[str]) -> str:
    """Ids are letters, digits, hyphens and underscores: they need no quoting, and others find no run."""
    return f"/runs/{run_id}" + ("?" + "&".join(f"with={name}" for name in wanted) if wanted else "")


# --- plots


def _drawings(shown: Sequence[Shown], recipe: Mapping[str, Any]) -> Iterator[Drawing]:
    """One per metric that any of the runs has, all along the same steps."""
    rows = [(one, [_plain(row) for row in one.figures.rows]) for one in shown]
    last = max((row.get("of") or row["step"] for _, some in rows for row in some), default=0)
    for metric in METRICS:
        series = [one for which, some in rows for one in _lines(metric, which, some, alone=len(shown) == 1)]
        steps = sum(metric.lines[0][0] in row for _, some in rows for row in some)
        if not series:
            continue
        drawn = "" if all(len(one.points) < DRAWN for one in series) else ", some drawn"
        yield draw(
            Plot(
                id=f"{shown[0].run.run_id}-{metric.id}",
                title=metric.title,
                n=f"n = {steps:,} steps{drawn}",
                x="step",
                y=metric.unit,
                series=series,
                marks=[(recipe[key], f"{word} {recipe[key]:g}") for key, word in metric.marks if recipe.get(key)],
                x_range=(0, last),
                percent=metric.percent,
                height=HEIGHT,
            )
        )


def _lines(metric: Metric, which: Shown, rows: Sequence[Mapping[str, Any]], *, alone: bool) -> Iterator[Series]:
    for place, (key, word) in enumerate(metric.lines):
        known = [row for row in rows if row.get(key) is not None]
        points = [Point(row["step"], row[key], tip=_tip(row, key, word)) for row in thinned(known, DRAWN)]
        tone: Tone = "warn" if alone and place else which.tone
        if points:
            name = word if alone else f"{title_of(which.run)}: {word}"
            yield Series(name, points, tone=tone, dashed=place > 0 and not alone)


def _tip(row: Mapping[str, Any], key: str, word: str) -> str:
    return f"step {row['step']:g}: {word} {row[key]:.4g}"


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A metrics row by the names of the plots: accuracy and margin of the rows that compare, a held-out look's apart."""
    look = row.get("heldout") or (row.get("epoch") or {}).get("heldout")
    if look is None:
        return {**row, **_of_compared(row)}
    plain = {"step": row["step"], "of": row.get("of")}
    told = {**look, **_of_compared(look)}
    return {**plain, **{f"heldout_{name}": told.get(name) for name in ("loss", "margin", "accuracy")}}


def _of_compared(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Each is a sum over all rows, where those without a better and a worse answer count as 0."""
    usable = row.get("usable", 1.0)
    return {name: row[name] / usable if usable else None for name in ("accuracy", "margin") if row.get(name) is not None}
