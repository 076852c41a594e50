"""Which versions may answer a request: those behind the name that it asks for, and the duels and the canary that are open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection

from pairloop.errors import NotFoundError
from pairloop.store import canaries, duels, versions
from pairloop.store.canaries import Canary
from pairloop.types import BASE_VERSION, Alias, Duel, DuelKind, Version

BASE_SELECTOR = "base"


@dataclass(frozen=True, slots=True)
class Routing:
    """Which versions answer, read in one transaction."""

    champion: int
    challenger: int | None
    pinned: int | None
    duel: Duel | None
    seed_duel: Duel | None
    canary: Canary | None
    warm: frozenset[int]

    @property
    def keep(self) -> frozenset[int]:
        """The versions that may be asked for at any moment."""
        beside = {self.challenger, None if self.canary is None else self.canary.version} - {None}
        return frozenset({BASE_VERSION, self.champion, *(number for number in beside if number is not None)}) | self.warm


class Router:
    """Reads from one snapshot of the store which versions answer. May be called from any thread."""

    def __init__(self, policy: str, keep_warm: int) -> None:
        self._policy = policy
        self._keep_warm = keep_warm
        self._warm: tuple[int, frozenset[int]] | None = None  # of which champion, and its forerunners that stay loaded

    def route(self, c: Connection, model: str) -> Routing:
        """The versions for a request to ``model``, a name of this policy; NotFoundError for any other."""
        policy = self._policy
        fine_tuned = versions.by_model_name(c, model) if model.startswith("ft:") else None
        if fine_tuned is not None:
            model = _of_this_policy(c, fine_tuned, policy)
        name, _, selector = model.partition("@")
        if name != policy:
            raise NotFoundError(f"the model {model!r} does not exist; this server answers as {policy!r}", param="model")
        named = versions.aliases_of(c, policy)
        champion, challenger = named.get(Alias.CHAMPION, BASE_VERSION), named.get(Alias.CHALLENGER)
        warm = self._forerunners(c, champion)
        canary = canaries.current(c, policy) if Alias.CANARY in named else None
        if "@" in model:
            return Routing(champion, challenger, self._pinned(c, model, selector, named), None, None, canary, warm)
        opened = duels.opened(c, policy) if challenger is not None else {}
        duel, seed_duel = opened.get(DuelKind.GATE), opened.get(DuelKind.SEED)
        if duel is None or (duel.champion, duel.challenger) != (champion, challenger):
            # A rollback in mid-duel leaves a duel whose champion no longer serves: nothing may be added to it.
            duel = seed_duel = None
        return Routing(champion, challenger, None, duel, seed_duel, canary, warm)

    def _forerunners(self, c: Connection, champion: int) -> frozenset[int]:
        """The former champions that stay loaded; read again when the champion has changed."""
        if self._warm is None or self._warm[0] != champion:
            self._warm = (champion, frozenset(versions.forerunners(c, self._policy, self._keep_warm)))
        return self._warm[1]

    def _pinned(self, c: Connection, model: str, selector: str, named: Mapping[Alias, int]) -> int:
        number = _by_name(named).get(selector)
        if number is not None:
            return number
        if selector.isascii() and selector.isdigit() and len(selector) <= 9:
            version = versions.get(c, self._policy, int(selector))
            if version is not None:
                return version.number
        raise NotFoundError(f"the model {model!r} does not exist; GET /v1/models lists those that do", param="model")


def version_called(c: Connection, policy: str, selector: str) -> int | None:
    """The version that a name behind the @ (base, champion, challenger) means now; None for any other text."""
    return _by_name(versions.aliases_of(c, policy)).get(selector)


def _by_name(named: Mapping[Alias, int]) -> Mapping[str, int]:
    return {BASE_SELECTOR: BASE_VERSION, str(Alias.CHAMPION): BASE_VERSION, **{str(alias): n for alias, n in named.items()}}


def _of_this_policy(c: Connection, version: Version, policy: str) -> str:
    """The name of a fine-tuned model's version; NotFoundError where it needs another base than this server has."""
    if version.policy == policy:
        return version.name
    base = versions.get(c, version.policy, BASE_VERSION)
    where = "another base" if base is None else f"the base {base.path}"
    raise NotFoundError(
        f"the model {version.model_name!r} needs {where}, which this server does not have; serve it by `pairloop serve` on "
        f"this store, with policy.name = {version.policy!r} and policy.model set to that base",
        param="model",
    )
