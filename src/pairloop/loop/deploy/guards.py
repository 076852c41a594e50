"""The live guards: whether a version's answers are worse than those of the champion whose place it took. Pure.

Every guard is a share of answers against a limit: of errors, of refusals, of thumbs down; of tokens slower than so many times
the former champion's median, of answers longer or shorter than so many times its median (so that a few huge ones decide
nothing). The limit comes from the former champion's answers, as an upper bound of its share; that the version exceeds it
must be shown by `statistics.log_excess`. Both are valid however often one looks. ``deploy.alpha`` is divided among the guards;
a guard's part goes half to the limit, a quarter to all answers since the start, and a quarter to the single hours (hour i gets
6 / (pi² i²) of it), so that what breaks late is not hidden behind a good past. Ville 1939; Bonferroni.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pairloop.config import DeploySection
from pairloop.statistics import at_most, log_excess, percent
from pairloop.store.traffic import Counts, class_of, minute_of
from pairloop.types import Reason

GUARDS = 6
FED_BY_ALL = frozenset({"errors", "refusal"})
"""Not the thumbs, which nobody need give, nor latency and lengths, which clients may set by what they ask for."""
QUICK_MS = 5.0
"""Milliseconds per token below which nothing is slow: 200 tokens a second."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Live answers of one version by minute, and its (thumbs, of them down)."""

    minutes: Mapping[datetime, Counts]
    thumbs: Mapping[datetime, tuple[int, int]]


@dataclass(slots=True)
class _Window:
    counts: Counts
    thumbs: int = 0
    down: int = 0


@dataclass(frozen=True, slots=True)
class _Guard:
    """``share`` gives (k, n) of a window; more than ``limit`` of them is too much. No limit: nothing to compare with."""

    rule: str
    share: Callable[[_Window], tuple[int, int]]
    limit: float | None
    what: str
    least: int


def look(new: Seen, former: Seen, section: DeploySection, opened_at: datetime) -> list[Reason]:
    """A reason per guard: broken (``passed`` False), fine, or None where too little is known. ``opened_at``: when it began."""
    whole, reference = _Window(Counts()), _Window(Counts())
    hours: dict[int, _Window] = {}
    _gather(former, lambda _: [reference])
    start = minute_of(opened_at)
    _gather(new, lambda at: [whole, hours.setdefault(int((at - start).total_seconds() // 3600), _Window(Counts()))])
    level = section.alpha / GUARDS
    return [_judge(guard, whole, hours, reference, level / 4) for guard in _guards(reference, section, level / 2)]


def broken(reasons: Sequence[Reason]) -> str | None:
    """What broke, in words; None where nothing did."""
    return "; ".join(reason.text for reason in reasons if reason.passed is False) or None


def is_known(reasons: Sequence[Reason]) -> bool:
    """True where the guards that any traffic feeds had enough of both versions: silence is no proof of health."""
    return all(reason.passed is not None for reason in reasons if reason.rule in FED_BY_ALL)


def _gather(seen: Seen, windows_of: Callable[[datetime], list[_Window]]) -> None:
    for at, counts in seen.minutes.items():
        for window in windows_of(at):
            window.counts.add(counts)
    for at, (n, down) in seen.thumbs.items():
        for window in windows_of(at):
            window.thumbs += n
            window.down += down


def _guards(former: _Window, section: DeploySection, level: float) -> list[_Guard]:
    old, least = former.counts, section.min_answers

    def rise(k: int, n: int, points: float) -> float | None:
        return min(1.0, at_most(k, n, level) + points) if n else None

    slow = _class_above(old.latency, section.max_latency_ratio, level, least=class_of(QUICK_MS))
    long = _class_above(old.length, section.max_length_ratio, level)
    short = _class_below(old.length, section.min_length_ratio, level)
    return [
        _Guard(
            "errors",
            lambda w: (w.counts.errors, w.counts.answers + w.counts.errors),
            rise(old.errors, old.answers + old.errors, section.max_error_rise),
            "answers failed",
            least,
        ),
        _Guard(
            "latency", _share(slow, lambda w: w.counts.latency, above=True), _half(slow), _than("slower", slow, "ms"), least
        ),
        _Guard("too_long", _share(long, lambda w: w.counts.length, above=True), _half(long), _than("longer", long), least),
        _Guard(
            "too_short", _share(short, lambda w: w.counts.length, above=False), _half(short), _than("shorter", short), least
        ),
        _Guard(
            "refusal",
            lambda w: (w.counts.refusals, w.counts.answers),
            rise(old.refusals, old.answers, section.max_refusal_rise),
            "answers were refusals, empty or cut off",
            least,
        ),
        _Guard(
            "thumbs",
            lambda w: (w.down, w.thumbs),
            rise(former.down, former.thumbs, section.max_thumbs_down_rise),
            "raters gave thumbs down",
            max(1, least // 3),
        ),
    ]


def _judge(guard: _Guard, whole: _Window, hours: Mapping[int, _Window], reference: _Window, level: float) -> Reason:
    """``level``: what all answers together may spend, and the single hours once more."""
    k, n = guard.share(whole)
    if guard.limit is None:
        return Reason(guard.rule, None, f"{guard.rule}: the former champion's answers are too few to compare with")
    looks = [(whole, level)]
    looks += [(window, level * 6 / (math.pi * (i + 1)) ** 2) for i, window in sorted(hours.items())]
    for window, spent in looks:
        k, n = guard.share(window)
        if n >= guard.least and log_excess(k, n, guard.limit) >= math.log(1 / spent):
            return Reason(guard.rule, False, _text(guard, guard.limit, k, n, "more than"), k / n, guard.limit)
    k, n = guard.share(whole)
    if n < guard.least:
        return Reason(guard.rule, None, f"{guard.rule}: {n} of {guard.least} answers", None, guard.limit)
    had = guard.share(reference)[1]
    if had < guard.least:  # so few that a limit from them lets nearly everything pass
        text = f"{guard.rule}: the former champion has {had} of {guard.least} answers to compare with"
        return Reason(guard.rule, None, text, k / n, guard.limit)
    return Reason(guard.rule, True, _text(guard, guard.limit, k, n, "not shown to be more than"), k / n, guard.limit)


def _text(guard: _Guard, limit: float, k: int, n: int, sign: str) -> str:
    return f"{guard.rule}: {k} of {n} {guard.what} ({percent(k / n, 1)}), {sign} {percent(limit, 1)}"


def _half(bound: int | None) -> float | None:
    return None if bound is None else 0.5


def _than(word: str, bound: int | None, unit: str = "") -> str:
    if bound is None:
        return ""
    value = 2 ** ((bound + (word != "shorter")) / 4)
    return f"answers took more than {value:.0f} {unit} a token" if unit else f"answers were {word} than {value:.0f} tokens"


def _share(bound: int | None, of: Callable[[_Window], Counter[int]], *, above: bool) -> Callable[[_Window], tuple[int, int]]:
    def share(window: _Window) -> tuple[int, int]:
        found = of(window)
        beyond = (n for key, n in found.items() if bound is not None and (key > bound if above else key < bound))
        return sum(beyond), found.total()

    return share


def _class_above(found: Counter[int], ratio: float, level: float, *, least: int | None = None) -> int | None:
    """The class that half of the answers exceed only where their median is more than ``ratio`` times this one's."""
    n, below, needed = found.total(), 0, math.log(1 / level)
    for key in sorted(found):
        below += found[key]
        if log_excess(below, n, 0.5) >= needed:  # the median is in this class at most
            bound = key + math.ceil(4 * math.log2(ratio))
            return bound if least is None else max(bound, least)
    return None


def _class_below(found: Counter[int], ratio: float, level: float) -> int | None:
    """As `_class_above`, downwards."""
    mirrored = Counter({-key: n for key, n in found.items()})
    bound = _class_above(mirrored, 1 / ratio, level)
    return None if bound is None else -bound
