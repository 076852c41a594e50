"""One version from the picks that it learned from to what happened to it in service; read from the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from pairloop.errors import NotFoundError
from pairloop.loop.cycle import RoundStatus, round_of
from pairloop.loop.feedback import is_revealed
from pairloop.store import (
    Store,
    canaries,
    cycles,
    datasets,
    duels,
    erasures,
    groups,
    runs,
    samples,
    traffic,
    verdicts,
    versions,
)
from pairloop.store.canaries import Canary
from pairloop.store.datasets import Evidence
from pairloop.store.erasures import Burden
from pairloop.store.versions import Promotion
from pairloop.types import (
    BASE_VERSION,
    Alias,
    Cycle,
    CycleState,
    Dataset,
    Duel,
    Interval,
    Message,
    Prompt,
    Run,
    Verdict,
    VerdictKind,
    Version,
)

DUELLED = 6
"""Prompts of the duel that are shown."""
TEXT_SHOWN = 2_000
"""Characters of an answer that are shown: a page with a few of a megabyte each would not open."""
TRAFFIC_FOR = timedelta(days=1)
SAME = "not set"


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt that a version and its champion answered; texts cut to `TEXT_SHOWN`. ``group_id``: the request it came from."""

    group_id: str
    against: int

    asked: str
    ours: str
    theirs: str


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a version answered since ``since``; milliseconds per token of the median and of the slowest hundredth."""

    answers: int
    errors: int
    refusals: int
    since: datetime
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting that differs from the parent's; a setting that one of them did not have is `SAME`."""

    key: str
    was: str
    now: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """``history``: moves of the champion that name this version. ``differences``: None where one of the two was not trained.

    ``evaluated`` and ``duelled``: answers beside the champion's, from the offline report and from the duel.
    """

    version: Version
    aliases: tuple[str, ...]
    champion: int
    past_champions: tuple[int, ...]
    dataset: Dataset | None
    evidence: Evidence | None
    run: Run | None
    cycle: Cycle | None
    trained: RoundStatus | None
    report: Mapping[str, Any] | None
    duel: Duel | None
    duel_picks: int
    verdicts: tuple[tuple[datetime, Verdict], ...]
    history: tuple[Promotion, ...]
    canaries: tuple[Canary, ...]
    differences: tuple[Difference, ...] | None
    evaluated: tuple[Sample, ...]
    duelled: tuple[Sample, ...]
    traffic: Traffic
    burden: Burden | None

    @property
    def metrics(self) -> dict[str, Interval]:
        """The offline report's, by name."""
        return {} if self.report is None else {name: Interval(**value) for name, value in self.report["metrics"].items()}

    @property
    def ended_otherwise(self) -> str | None:
        """Why its cycle ended where the gate did not end it: by hand, by a live guard, by a failure."""
        if self.cycle is None or not self.cycle.state.is_terminal:
            return None
        judged = bool(self.verdicts) and self.verdicts[-1][1].kind is not VerdictKind.CONTINUE
        return None if judged else self.cycle.steps[-1].record.get("reason")


def read(store: Store, policy: str, number: int, *, now: datetime | None = None) -> Lineage:
    """NotFoundError where the policy has no such version."""
    with store.reading() as c:
        version = versions.get(c, policy, number)
        if version is None:
            raise NotFoundError(f"no version {policy}@{number}", param="number")
        history = versions.promotions(c, policy)
        dataset = None if version.dataset_id is None else datasets.get(c, version.dataset_id)
        run = None if version.run_id is None else runs.get(c, version.run_id)
        cycle = None if run is None or run.cycle_id is None else cycles.get(c, run.cycle_id)
        duel = _duel(c, cycle)
        parent = None if version.parent is None else versions.get(c, policy, version.parent)
        return Lineage(
            version=version,
            aliases=tuple(alias.value for alias, named in versions.aliases_of(c, policy).items() if named == number),
            champion=versions.alias(c, policy, Alias.CHAMPION) or BASE_VERSION,
            past_champions=tuple(versions.past_champions(history)[:-1]),
            dataset=dataset,
            evidence=None if dataset is None else datasets.evidence(c, dataset.dataset_id),
            run=run,
            cycle=cycle,
            trained=None if cycle is None else round_of(cycle),
            report=None if cycle is None else next((s.record["report"] for s in cycle.steps if "report" in s.record), None),
            duel=duel,
            duel_picks=0 if duel is None else duels.count_picks(c, duel.duel_id),
            verdicts=() if cycle is None else tuple(verdicts.for_cycle(c, cycle.cycle_id)),
            history=tuple(one for one in history if number in (one.number, one.previous)),
            canaries=tuple(canaries.of_version(c, policy, number)),
            differences=differences(parent, version),
            evaluated=() if duel is not None and duel.closed_at is None else _evaluated(c, version),
            duelled=() if duel is None else _duelled(c, duel),
            traffic=_traffic(c, policy, number, now or datetime.now(UTC)),
            burden=erasures.burdens(c, policy).get(number),
        )


def differences(parent: Version | None, version: Version) -> tuple[Difference, ...] | None:
    """The settings of a version's training that its parent's did not have; None where one of them has no record."""
    recipes = [_recipe(one) for one in (parent, version)]
    if any(recipe is None for recipe in recipes):
        return None
    was, now = (_flat(recipe or {}) for recipe in recipes)
    keys = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
    return tuple(Difference(key, _told(was, key), _told(now, key)) for key in keys)


def _recipe(version: Version | None) -> Mapping[str, Any] | None:
    return None if version is None or version.record is None else version.record.get("recipe")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train": {"beta": 1}}`` as ``{"train.beta": 1}``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _told(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else SAME


def _duel(c: Connection, cycle: Cycle | None) -> Duel | None:
    duel_id = None if cycle is None else (cycle.record(CycleState.DUELLING) or {}).get("duel_id")
    return None if duel_id is None else duels.get(c, duel_id)


def _evaluated(c: Connection, version: Version) -> tuple[Sample, ...]:
    """What the offline report kept: there is some also of a version that was rejected before anybody saw it."""
    kept = samples.of_version(c, version.policy, version.number)
    return tuple(
        Sample(one.group_id, one.against, shown(_asked(prompt)), shown(one.ours), shown(one.theirs)) for prompt, one in kept
    )


def _duelled(c: Connection, duel: Duel) -> tuple[Sample, ...]:
    """The newest prompts of the duel with both answers; while it is open, of those that somebody picked from."""
    found = []
    for group in groups.of_duel(c, duel.duel_id, limit=DUELLED):
        if duel.closed_at is None and not is_revealed(c, group):
            continue
        by_version = {answer.version: answer for answer in group.completions}
        if duel.challenger in by_version and duel.champion in by_version:
            sides = (by_version[duel.challenger], by_version[duel.champion])
            texts = (shown(_asked(group.prompt)), *(shown(side.text) for side in sides))
            found.append(Sample(group.group_id, duel.champion, *texts))
    return tuple(found)


def _asked(prompt: Prompt) -> str:
    """What was said last."""
    if isinstance(prompt, str):
        return prompt
    said: Sequence[Message] = [turn for turn in prompt if turn.role == "user"] or prompt
    return said[-1].content if said else ""


def shown(text: str) -> str:
    """The beginning of a text, and how long it is where that is not all."""
    return text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]}… ({len(text):,} characters)"


def _traffic(c: Connection, policy: str, number: int, now: datetime) -> Traffic:
    since, total = now - TRAFFIC_FOR, traffic.Counts()
    for counts in traffic.by_minute(c, policy, number, since, now + timedelta(minutes=1)).values():
        total.add(counts)
    p50, p99 = (_quantile(total.latency, q) for q in (0.5, 0.99))
    return Traffic(total.answers, total.errors, total.refusals, since, p50, p99)


def _quantile(classes: Mapping[int, int], q: float) -> float | None:
    """The upper end of the class (`traffic.class_of`) in which the quantile lies; None without answers."""
    left = q * sum(classes.values())
    for key in sorted(classes):
        left -= classes[key]
        if left <= 0:
            return float(2 ** ((key + 1) / 4))
    return None
