"""The policy's versions as the pages show them: what became of each, what it learned from, how much traffic its duel took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection

from pairloop.loop.cycle import round_of
from pairloop.statistics import share
from pairloop.store import Store, counts, duels, versions
from pairloop.store.versions import Promotion
from pairloop.types import CycleState, Duel, Interval, VerdictKind, Version
from pairloop.web.curve import Point
from pairloop.web.curve_plot import Details, Fate, fate_of, moves
from pairloop.web.status import CYCLES_SHOWN, CycleView, Status


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table of versions; ``view``: the cycle that put it to the test, if it is among those remembered."""

    version: Version
    aliases: tuple[str, ...]
    fate: Fate | None
    view: CycleView | None
    point: Point | None
    n_train: int | None

    @property
    def words(self) -> str | None:
        """Why it ended as it did: the gate's words or, where others ended the cycle, theirs."""
        if self.view is None:
            return None
        verdict, last = self.view.verdict, self.view.cycle.steps[-1]
        if verdict is not None and (verdict.kind is not VerdictKind.CONTINUE or not last.state.is_terminal):
            return verdict.text
        return last.record.get("reason")


@dataclass(frozen=True, slots=True)
class History:
    """One page of versions, newest first; ``older``: the number below which the next page begins, None at the end."""

    rows: tuple[Row, ...]
    older: int | None
    total: int
    moves: tuple[Promotion, ...]
    details: Mapping[int, Details]


def read(store: Store, status: Status, *, before: int | None, limit: int) -> History:
    """The page below number ``before``, and what the hover of the curve tells of each of its points."""
    name = status.now.policy
    with store.reading() as c:
        found = versions.newest(c, name, before=before, limit=limit + 1)
        history = tuple(versions.promotions(c, name))
        named = versions.aliases_of(c, name)
        details = _details(c, status)
        total = versions.count(c, name)
    moved = moves(history)
    views = views_of(status)
    points = {point.contest.challenger: point for point in status.points}
    rows = tuple(
        Row(
            version=version,
            aliases=tuple(alias.value for alias, number in named.items() if number == version.number),
            fate=fate(version.number, moved, views.get(version.number)),
            view=views.get(version.number),
            point=points.get(version.number),
            n_train=n_train(views.get(version.number)),
        )
        for version in found[:limit]
    )
    return History(rows, rows[-1].version.number if len(found) > limit else None, total, history, details)


def views_of(status: Status) -> dict[int, CycleView]:
    """The cycle that put each version to the test, by number."""
    return {view.challenger: view for view in reversed(status.cycles) if view.challenger is not None}


def fate(number: int, moved: Mapping[int, Fate], view: CycleView | None) -> Fate | None:
    verdict = None if view is None or view.verdict is None else view.verdict.kind.value
    return fate_of(number, moved, verdict=verdict, state=None if view is None else view.cycle.state)


def n_train(view: CycleView | None) -> int | None:
    """Rows of the snapshot that the cycle trained on."""
    record = None if view is None else view.cycle.record(CycleState.TRAINING)
    return None if record is None else record.get("n_train")


def beta_of(version: Version | None) -> float | None:
    recipe = {} if version is None or version.record is None else version.record.get("recipe") or {}
    beta = (recipe.get("train") or {}).get("beta")
    return beta if isinstance(beta, int | float) else None


def _details(c: Connection, status: Status) -> dict[int, Details]:
    wanted = {point.contest.challenger for point in status.points}
    if not wanted:
        return {}
    name, views = status.now.policy, views_of(status)
    made = {version.number: version for version in versions.list_(c, name, after=min(wanted) - 1)}
    fought = {duel.challenger: duel for duel in duels.list_(c, name, CYCLES_SHOWN) if duel.challenger in wanted}
    picks = duels.counts_of_picks(c, [duel.duel_id for duel in fought.values()])
    shares = _duel_shares(c, name, list(fought.values()))
    details = {}
    for number in wanted:
        view, duel = views.get(number), fought.get(number)
        trained = None if view is None else round_of(view.cycle)
        details[number] = Details(
            n_train=n_train(view),
            beta=beta_of(made.get(number)),
            kl_base=None if trained is None else trained.kl_base,
            picks=None if duel is None else picks.get(duel.duel_id, 0),
            duel_share=None if duel is None else shares.get(duel.duel_id),
        )
    return details


def _duel_shares(c: Connection, policy: str, fought: list[Duel]) -> dict[str, Interval]:
    """Which share of all requests each duel took while it was open; absent where nobody asked anything meanwhile."""
    taken = counts.requests_of_duels(c, [duel.duel_id for duel in fought])
    found = {}
    for duel in fought:
        asked = counts.requests_between(c, policy, duel.opened_at, duel.closed_at or datetime.now(UTC))
        if asked:
            found[duel.duel_id] = share(min(1.0, taken.get(duel.duel_id, 0) / asked), asked)
    return found
