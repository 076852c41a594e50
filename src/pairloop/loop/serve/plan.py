"""Deciding: which pool a request falls in, which versions answer it, and what kind of group it becomes."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import perf_counter

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import InvalidRequestError
from pairloop.loop.serve.calls import call_origin
from pairloop.loop.serve.request import ChatRequest
from pairloop.loop.serve.routing import Router, Routing
from pairloop.policy.call_forms import form_of
from pairloop.policy.protocols import RESPONSE_FORMAT, TOP_LOGPROBS, Sampler
from pairloop.store import Store, groups, new_group_id
from pairloop.types import Group, GroupKind, Message, Pool, offered_tools, spoken

PARENT_KEY = "parent"
CONVERSATION_KEY = "conversation_id"


def pool_of(key: str, gate_share: float) -> Pool:
    """The pool of a rater (or conversation): a stable hash of ``key``, the share ``gate_share`` of which judges."""
    return Pool.GATE if share_of(key) < gate_share else Pool.TRAIN


def share_of(key: str) -> float:
    """A stable number from [0, 1) for ``key``, spread evenly: which share of all keys it belongs to."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


@dataclass(frozen=True, slots=True)
class Plan:
    """The group to be (without completions) and the version that answers each index; ``keep`` are not to be evicted.

    ``stored`` is the group as it is stored: without what is taken out of texts, and then as such a prompt is encoded.
    ``is_live``: the server chose the version, not the client. ``shadow``: the version that answers once more, unseen.
    """

    group: Group
    stored: Group
    versions: tuple[int, ...]
    keep: frozenset[int]
    asked: ChatRequest
    is_live: bool = True
    shadow: int | None = None

    @property
    def witness(self) -> str:
        """Whose experience an answer is: the user's, else the caller's. A client names a new conversation whenever it likes."""
        return self.group.user or self.asked.caller or "anybody"


class Planner:
    """Makes a plan of each request, from one snapshot of the store. May be called from any thread."""

    def __init__(self, store: Store, sampler: Sampler, config: Config, rng: random.Random) -> None:
        self._store = store
        self._sampler = sampler
        self._config = config
        self._rng = rng
        self._router = Router(config.policy.name, config.keep_warm)

    def plan(self, request: ChatRequest) -> Plan:
        """Route, pick the predecessor and the pool, encode the prompt. InvalidRequestError, NotFoundError (model)."""
        self._check_abilities(request)
        request = self._named(request)
        with self._store.reading() as c:
            routing = self._router.route(c, request.model)
            parent, parent_index = self._predecessor(c, request)
        group_id = new_group_id()
        prompt_token_ids = self._sampler.tokens.encode_prompt(request.messages)
        pool = self._pool(request, parent) if routing.pinned is None else Pool.GATE
        count = 2 if request.n == 1 and request.pair_allowed and self._coin(self._config.serve.exposure_rate) else request.n
        kind, answering, duel_id = self._cast(routing, pool, count, request)
        group = Group(
            group_id=group_id,
            policy=self._config.policy.name,
            kind=kind,
            pool=pool,
            prompt=request.messages,
            completions=(),
            created_at=datetime.now(UTC),
            prompt_token_ids=prompt_token_ids,
            sampling=replace(
                request.params,
                max_tokens=self._room(len(prompt_token_ids), request.max_tokens),
                stop=request.params.stop + self._end_of_call(request),
                is_constrained=request.response_format is not None,
            ),
            user=request.user,
            conversation_id=request.metadata.get(CONVERSATION_KEY) or (parent.conversation_id if parent else None) or group_id,
            parent_group_id=parent.group_id if parent else None,
            parent_index=parent_index,
            duel_id=duel_id,
            metadata=dict(request.metadata),
        )
        return Plan(
            group,
            self._as_stored(group),
            answering,
            routing.keep,
            request,
            is_live=routing.pinned is None,
            shadow=self._shadow(routing, answering),
        )

    def _named(self, request: ChatRequest) -> ChatRequest:
        """The request with pseudonyms for ids that are personal data themselves, as people and conversations are stored."""
        redactor = self._store.redactor
        if redactor is None:
            return request
        user = None if request.user is None else redactor.identifier(request.user)
        return replace(request, user=user, metadata=redactor.values(request.metadata, ids=(CONVERSATION_KEY,)))

    def _as_stored(self, group: Group) -> Group:
        """What is taken out of the prompt is not in its tokens either: it is encoded anew."""
        if self._store.redactor is None:
            return group
        stored = self._store.redactor.group(group)
        if stored.prompt == group.prompt or isinstance(stored.prompt, str):
            return stored
        try:
            return replace(stored, prompt_token_ids=self._sampler.tokens.encode_prompt(stored.prompt))
        except InvalidRequestError:  # a template that wants, say, another form of a call's arguments
            return stored

    def _check_abilities(self, request: ChatRequest) -> None:
        """InvalidRequestError for what the model's template or its engine cannot do."""
        has_tools = self._sampler.tokens.has_tools
        if offered_tools(request.messages) and not has_tools:
            raise InvalidRequestError("this model's chat template has no tools; leave them out", param="tools")
        if not has_tools and any(turn.tool_calls or turn.role == "tool" for turn in request.messages):
            raise InvalidRequestError(
                "this model's chat template has no tools, so no turn can call or answer", param="messages"
            )
        if request.top_logprobs and TOP_LOGPROBS not in self._sampler.abilities:
            raise InvalidRequestError("this engine tells the log-prob of the sampled token only; send 0", param=TOP_LOGPROBS)
        if request.response_format is not None and RESPONSE_FORMAT not in self._sampler.abilities:
            raise InvalidRequestError(
                "this engine cannot hold the model to a response format; leave it out, or check the answer yourself",
                param=RESPONSE_FORMAT,
            )

    def _end_of_call(self, request: ChatRequest) -> tuple[str, ...]:
        """The stop string that keeps an answer to one call, where that is asked for."""
        if not (request.one_call and offered_tools(request.messages)):
            return ()
        end = form_of(self._sampler.tokens).ends
        if end is None:
            raise InvalidRequestError("this model's calls cannot be held to one; leave it out", param="parallel_tool_calls")
        return (end,)

    def _predecessor(self, c: Connection, request: ChatRequest) -> tuple[Group | None, int | None]:
        """The group that the conversation goes on from and the index of the branch that was taken."""
        last = next((m for m in reversed(request.messages) if m.role == "assistant"), None)
        if last is not None and self._store.redactor is not None:  # as it was stored, so that it is found
            last = replace(last, content=self._store.redactor.text(last.content))
        called = call_origin(last.tool_calls[0].id) if last is not None and last.tool_calls else None
        named = request.metadata.get(PARENT_KEY)
        if named is not None:
            parent = groups.get(c, named)
            is_shown = parent is not None and not parent.is_erased and parent.kind is not GroupKind.SHADOW
            if parent is None or parent.policy != self._config.policy.name or not is_shown:
                raise InvalidRequestError(f"no stored completion {named!r} of this policy", param="metadata.parent")
            return parent, _branch(parent, last, called)
        if called is not None:
            caller = groups.get(c, called[0])
            mine = caller is not None and (caller.policy, caller.user) == (self._config.policy.name, request.user)
            return (caller, _branch(caller, last, called)) if caller is not None and mine else (None, None)
        if last is None or last.tool_calls or request.user is None:
            return None, None
        found = groups.latest_answer(c, self._config.policy.name, request.user, last.content)
        return (groups.get(c, found[0]), found[1]) if found is not None else (None, None)

    def _pool(self, request: ChatRequest, parent: Group | None) -> Pool:
        """By user, else by conversation: the named one, the predecessor's, or that of the same opening turn."""
        gate_share = self._config.serve.gate_share
        if request.user is not None:
            return pool_of(request.user, gate_share)
        if not request.metadata.get(CONVERSATION_KEY) and parent is not None and parent.user is None:
            return parent.pool
        return pool_of(_who(request), gate_share)

    def _cast(
        self, routing: Routing, pool: Pool, n: int, request: ChatRequest
    ) -> tuple[GroupKind, tuple[int, ...], str | None]:
        """Kind, version per index, and duel of a group.

        A request that would tell the sides apart (`ChatRequest.is_telling`) never duels. Of those that duel a share does so
        against the base. The canary answers its users in both pools, all completions of a group alike; it changes neither who
        is in which pool nor who duels.
        """
        if routing.pinned is not None:
            return GroupKind.HELDOUT, (routing.pinned,) * n, None
        canary = routing.canary
        is_canary = canary is not None and share_of(canary.salt + "\0" + _who(request)) < canary.share
        answering = canary.version if canary is not None and is_canary else routing.champion
        if pool is Pool.TRAIN:
            return GroupKind.TRAIN, (answering,) * n, None
        duel = routing.duel
        if n == 2 and duel is not None and not request.is_telling and self._coin(self._config.serve.duel_share):
            if routing.seed_duel is not None and self._coin(self._config.gate.seed_share):
                duel = routing.seed_duel
            sides = (duel.champion, duel.challenger)
            return GroupKind.DUEL, sides if self._coin(0.5) else sides[::-1], duel.duel_id
        return GroupKind.HELDOUT, (answering,) * n, None

    def _shadow(self, routing: Routing, answering: tuple[int, ...]) -> int | None:
        """The challenger or canary, where it is to answer an ordinary request once more, unseen."""
        new = routing.canary.version if routing.canary is not None else routing.challenger
        if new is None or routing.pinned is not None or new in answering or not self._coin(self._config.deploy.shadow_share):
            return None
        return new

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


def shadow_of(plan: Plan, number: int) -> Plan:
    """The plan of what version ``number`` would say, of which nobody is told: one completion of the same prompt.

    Its id follows from the group's, so that who deletes that one deletes this one, too.
    """
    group, stored = (
        replace(one, group_id=groups.shadow_id(one.group_id), kind=GroupKind.SHADOW, duel_id=None)
        for one in (plan.group, plan.stored)
    )
    asked = replace(plan.asked, top_logprobs=0, came_at=perf_counter())
    return replace(plan, group=group, stored=stored, versions=(number,), asked=asked, shadow=None)


def _who(request: ChatRequest) -> str:
    """Who asks, for what must stay the same for them: the user, else the named conversation, else how it was opened."""
    named = request.user if request.user is not None else request.metadata.get(CONVERSATION_KEY)
    if named:
        return named
    opening = []
    for message in spoken(request.messages):
        opening.append(f"{message.role}\0{message.content}")
        if message.role == "user":
            break
    return "\0".join(opening)


def _branch(parent: Group, last: Message | None, called: tuple[str, int] | None) -> int | None:
    """The index of the answer that the conversation went on from: by its call where it made one, else by its text."""
    if last is None:
        return None
    if called is not None:
        group_id, index = called
        return index if group_id == parent.group_id and index < len(parent.completions) else None
    return next((i for i, done in enumerate(parent.completions) if done.text == last.content), None)
