"""Deciding: which pool a request falls in, which versions answer it, and what kind of group it becomes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.policy.protocols import Sampler
from pairloop.store import Store, duels, groups, new_group_id, versions
from pairloop.types import BASE_VERSION, Alias, Duel, Group, GroupKind, Message, Pool, SamplingParams, Version

PARENT_KEY = "parent"
CONVERSATION_KEY = "conversation_id"
BASE_SELECTOR = "base"


def pool_of(key: str, gate_share: float) -> Pool:
    """The pool of a rater (or conversation): a stable hash of ``key``, the share ``gate_share`` of which judges."""
    point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return Pool.GATE if point < gate_share * 2**64 else Pool.TRAIN


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a client asks for; ``pair_allowed`` means it sent no n but takes two answers. ``max_tokens`` None: the default."""

    model: str
    messages: tuple[Message, ...]
    n: int = 1
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    user: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    pair_allowed: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The group to be (without completions) and the version that answers each index; ``keep`` are not to be evicted."""

    group: Group
    versions: tuple[int, ...]
    keep: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Routing:
    """Which versions answer, read in one transaction."""

    champion: int
    challenger: int | None
    pinned: int | None
    duel: Duel | None


class Planner:
    """Makes a plan of each request, from one snapshot of the store. May be called from any thread."""

    def __init__(self, store: Store, sampler: Sampler, config: Config, rng: random.Random) -> None:
        self._store = store
        self._sampler = sampler
        self._config = config
        self._rng = rng

    def plan(self, request: ChatRequest) -> Plan:
        """Route, pick the predecessor and the pool, encode the prompt. InvalidRequestError, NotFoundError (model)."""
        with self._store.reading() as c:
            routing = self._route(c, request.model)
            parent, parent_index = self._predecessor(c, request)
        group_id = new_group_id()
        prompt_token_ids = self._sampler.tokens.encode_prompt(request.messages)
        pool = self._pool(request, parent) if routing.pinned is None else Pool.GATE
        count = 2 if request.n == 1 and request.pair_allowed and self._coin(self._config.serve.exposure_rate) else request.n
        kind, answering, duel_id = self._cast(routing, pool, count, repeatable=request.params.is_repeatable)
        group = Group(
            group_id=group_id,
            policy=self._config.policy.name,
            kind=kind,
            pool=pool,
            prompt=request.messages,
            completions=(),
            created_at=datetime.now(UTC),
            prompt_token_ids=prompt_token_ids,
            sampling=replace(request.params, max_tokens=self._room(len(prompt_token_ids), request.max_tokens)),
            user=request.user,
            conversation_id=request.metadata.get(CONVERSATION_KEY) or (parent.conversation_id if parent else None) or group_id,
            parent_group_id=parent.group_id if parent else None,
            parent_index=parent_index,
            duel_id=duel_id,
            metadata=dict(request.metadata),
        )
        return Plan(group, answering, frozenset({BASE_VERSION, routing.champion, routing.challenger or BASE_VERSION}))

    def _route(self, c: Connection, model: str) -> _Routing:
        policy = self._config.policy.name
        fine_tuned = versions.by_model_name(c, model) if model.startswith("ft:") else None
        if fine_tuned is not None:
            model = _of_this_policy(c, fine_tuned, policy)
        name, _, selector = model.partition("@")
        if name != policy:
            raise NotFoundError(f"the model {model!r} does not exist; this server answers as {policy!r}", param="model")
        champion = versions.alias(c, policy, Alias.CHAMPION) or BASE_VERSION
        challenger = versions.alias(c, policy, Alias.CHALLENGER)
        if "@" in model:
            pinned = self._pinned(c, model, selector, champion, challenger)
            return _Routing(champion, challenger, pinned, None)
        duel = duels.current(c, policy) if challenger is not None else None
        # A rollback in mid-duel leaves a duel whose champion no longer serves: nothing may be added to it.
        live = duel if duel is not None and (duel.champion, duel.challenger) == (champion, challenger) else None
        return _Routing(champion, challenger, None, live)

    def _pinned(self, c: Connection, model: str, selector: str, champion: int, challenger: int | None) -> int:
        by_name = {BASE_SELECTOR: BASE_VERSION, str(Alias.CHAMPION): champion, str(Alias.CHALLENGER): challenger}
        number = by_name.get(selector)
        if number is not None:
            return number
        if selector.isascii() and selector.isdigit() and len(selector) <= 9:
            version = versions.get(c, self._config.policy.name, int(selector))
            if version is not None:
                return version.number
        raise NotFoundError(f"the model {model!r} does not exist; GET /v1/models lists those that do", param="model")

    def _predecessor(self, c: Connection, request: ChatRequest) -> tuple[Group | None, int | None]:
        """The group that the conversation goes on from and the index of the branch that was taken."""
        last = next((m.content for m in reversed(request.messages) if m.role == "assistant"), None)
        named = request.metadata.get(PARENT_KEY)
        if named is not None:
            parent = groups.get(c, named)
            if parent is None or parent.policy != self._config.policy.name:
                raise InvalidRequestError(f"no stored completion {named!r} of this policy", param="metadata.parent")
            return parent, next((i for i, done in enumerate(parent.completions) if done.text == last), None)
        if last is None or request.user is None:
            return None, None
        found = groups.latest_answer(c, self._config.policy.name, request.user, last)
        return (groups.get(c, found[0]), found[1]) if found is not None else (None, None)

    def _pool(self, request: ChatRequest, parent: Group | None) -> Pool:
        """By user, else by conversation: the named one, the predecessor's, or that of the same opening turn."""
        gate_share = self._config.serve.gate_share
        if request.user is not None:
            return pool_of(request.user, gate_share)
        named = request.metadata.get(CONVERSATION_KEY)
        if named:
            return pool_of(named, gate_share)
        if parent is not None and parent.user is None:
            return parent.pool
        opening = []
        for message in request.messages:
            opening.append(f"{message.role}\0{message.content}")
            if message.role == "user":
                break
        return pool_of("\0".join(opening), gate_share)

    def _cast(
        self, routing: _Routing, pool: Pool, n: int, *, repeatable: bool
    ) -> tuple[GroupKind, tuple[int, ...], str | None]:
        """Kind, version per index, and duel of a group.

        A seeded or greedy request never duels: asked once more of ``name@champion`` it would tell which side is the champion's.
        """
        if routing.pinned is not None:
            return GroupKind.HELDOUT, (routing.pinned,) * n, None
        if pool is Pool.TRAIN:
            return GroupKind.TRAIN, (routing.champion,) * n, None
        duel = routing.duel
        if n == 2 and duel is not None and not repeatable and self._coin(self._config.serve.duel_share):
            sides = (duel.champion, duel.challenger)
            return GroupKind.DUEL, sides if self._coin(0.5) else sides[::-1], duel.duel_id
        return GroupKind.HELDOUT, (routing.champion,) * n, None

    def _coin(self, share: float) -> bool:
        return self._rng.random() < share

    def _room(self, prompt_tokens: int, wanted: int | None) -> int:
        """Tokens that a completion may have; InvalidRequestError where the prompt alone fills the context."""
        limit = self._sampler.max_context
        if self._config.serve.max_context:
            limit = min(limit, self._config.serve.max_context)
        room = limit - prompt_tokens
        if room < 1:
            raise InvalidRequestError(
                f"the messages have {prompt_tokens} tokens; the model's context of {limit} leaves no room for an answer",
                param="messages",
                code="context_length_exceeded",
            )
        return min(wanted or self._config.serve.max_tokens, room)


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
