"""raters: who picks, what is odd about them, and whose votes are set aside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pairloop.cli.output import config_option, show, table, verb
from pairloop.cli.verbs import Verbs

if TYPE_CHECKING:
    from pairloop.loop.raters import Checked, Effect, FlipRate
    from pairloop.store.quarantines import Quarantine

_rater = click.argument("rater")
_reason = click.option("--reason", required=True, help="Kept with the decision.")
_preview = click.option("--preview", is_flag=True, help="Only say what it would change.")


@click.group(cls=Verbs)
def raters() -> None:
    """Look at the people who pick, and set a rater's votes aside."""


@raters.command("list")
@config_option
@click.option("--flagged", is_flag=True, help="Only those about whom something is odd, and the quarantined.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="Raters to show, most picks first.")
@verb
def raters_list(config_path: Path, flagged: bool, limit: int, as_json: bool) -> None:
    """Raters of the newest 20,000 picks, and how often a pick says the opposite of what was meant.

    Flags: `side_bias` (one side too often), `length_outlier` and `duel_outlier` (another taste than everybody else's),
    `instant_picks`. Tests are adjusted for the number of raters: about one list in a hundred flags an honest one.
    """
    from pairloop.cli.opening import open_store
    from pairloop.loop import raters as desk

    with open_store(config_path) as (config, store):
        found = desk.look(store, config)
    chosen = [one for one in found.checked if not flagged or one.flags or one.rater_id in found.quarantined]
    document = {
        "raters": chosen,
        "quarantined": list(found.quarantined.values()),
        "flip_rate": _flips_json(found.flip_rate),
    }
    rows = [_row(one, found.quarantined.get(one.rater_id)) for one in chosen[:limit]]
    headers = ("rater", "picks", "instant", "first place", "longer", "challenger", "flags", "quarantined")
    text = table(headers, rows) if rows else "no picks yet" if not flagged else "nobody is flagged"
    if len(chosen) > limit:
        text += f"\n… and {len(chosen) - limit} more"
    show(document, f"{text}\n{_flips_text(found.flip_rate)}", as_json=as_json)


@raters.command()
@_rater
@config_option
@_reason
@_preview
@verb
def quarantine(rater: str, config_path: Path, reason: str, preview: bool, as_json: bool) -> None:
    """Set RATER's votes aside from now on, in snapshots and duels; they stay stored, and `release` brings them back."""
    _decide(rater, config_path, reason, "quarantine", is_preview=preview, as_json=as_json)


@raters.command()
@_rater
@config_option
@_reason
@_preview
@verb
def release(rater: str, config_path: Path, reason: str, preview: bool, as_json: bool) -> None:
    """Let RATER's votes count again."""
    _decide(rater, config_path, reason, "release", is_preview=preview, as_json=as_json)


def _decide(rater: str, config_path: Path, reason: str, action: str, *, is_preview: bool, as_json: bool) -> None:
    from pairloop.cli.opening import actor, open_store
    from pairloop.loop import raters as desk
    from pairloop.store.quarantines import Action

    with open_store(config_path) as (config, store):
        if is_preview:
            effect = desk.preview(store, config, rater, Action(action))
        else:
            effect = desk.decide(store, config, rater, Action(action), reason, actor=actor())
    show({"done": not is_preview, "effect": effect}, _effect_text(effect, is_done=not is_preview), as_json=as_json)


def _effect_text(effect: Effect, *, is_done: bool) -> str:
    verbs = {"quarantine": ("quarantined", "would be quarantined"), "release": ("released", "would be released")}
    head = f"rater {effect.rater_id} {verbs[effect.action.value][not is_done]}: {effect.picks} rows of feedback, "
    head += f"{effect.pairs} pairs of the next snapshot rest on them"
    if effect.duel_before is None or effect.duel_after is None:
        return f"{head}; no duel is open"
    before, after = effect.duel_before, effect.duel_after
    return (
        f"{head}; the open duel goes from {before.wins}–{before.losses} (e-value {before.e_value:.3g}) "
        f"to {after.wins}–{after.losses} (e-value {after.e_value:.3g})"
    )


def _row(one: Checked, held: Quarantine | None) -> tuple[object, ...]:
    shares = (one.shares.get(aspect) for aspect in ("side_bias", "length_outlier", "duel_outlier"))
    told = [None if share is None else f"{share.k}/{share.n} (p {share.p:.2g})" for share in shares]
    return (one.rater_id, one.picks, one.instant or None, *told, ", ".join(one.flags), held.reason if held else None)


def _flips_json(found: FlipRate | None) -> dict[str, object] | None:
    if found is None:
        return None
    return {
        "pairs": found.pairs,
        "disagreements": found.disagreements,
        **found.rate._asdict(),
        "label_smoothing": found.label_smoothing,
    }


def _flips_text(found: FlipRate | None) -> str:
    if found is None:
        return "flip rate: not measured; it takes picks of one rater about the same two answers in both orders"
    from pairloop.statistics import percent

    rate = found.rate
    return (
        f"flip rate {percent(rate.mean, 1)} (95 % interval {percent(rate.lo, 1)} to {percent(rate.hi, 1)}): "
        f"{found.disagreements} of {found.pairs} "
        f"questions asked again, sides swapped, were answered differently; train.label_smoothing = {found.label_smoothing}"
    )


COMMANDS = (raters,)
