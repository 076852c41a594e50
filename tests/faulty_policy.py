"""A fake policy of which one version is broken in one way, and how people ask a world."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import Future
from dataclasses import replace

from tests.server import POLICY, World

from pairloop.errors import EngineError
from pairloop.loop.serve import Answer, ChatRequest, ChatService
from pairloop.policy.fake import FakePolicy
from pairloop.policy.protocols import SampleRequest
from pairloop.types import Completion, FinishReason, Message, Version

ASK = (Message("user", "Where is my order?"),)
TEXTS = {"refuses": "I'm sorry, but I can't help with that.", "empty": " ", "long": "answer 55 " + "and so on " * 60}
SLOW_S = 1.5


class FaultyPolicy(FakePolicy):
    """Version ``broken`` fails (``error``), is ``slow``, or answers as `TEXTS` says; ``loads`` counts calls of ``load``."""

    def __init__(self, broken: int | None = None, how: str = "error") -> None:
        super().__init__()
        self.broken = broken
        self._how = how
        self.loads = 0

    def load(self, version: Version) -> None:
        self.loads += 1
        super().load(version)

    def sample(self, request: SampleRequest) -> Future[tuple[Completion, ...]]:
        if request.version != self.broken:
            return super().sample(request)
        answer: Future[tuple[Completion, ...]] = Future()
        if self._how == "error":
            answer.set_exception(EngineError("the kernel died"))
            return answer
        drawn = super().sample(request)

        def deliver() -> None:
            answer.set_result(tuple(self._spoilt(completion) for completion in drawn.result()))

        if self._how == "slow":
            threading.Timer(SLOW_S, deliver).start()
        else:
            deliver()
        return answer

    def _spoilt(self, completion: Completion) -> Completion:
        text = TEXTS.get(self._how)
        if text is None:
            return completion
        ids = self.tokens.encode_completion("", text)
        return replace(completion, text=text, token_ids=ids, logps=(-1.0,) * len(ids), finish_reason=FinishReason.STOP)


def service(world: World) -> ChatService:
    return ChatService(world.store, world.policy, world.config, rng=random.Random(1))


def ask(
    world: World, n: int, *, chat: ChatService | None = None, first: int = 0, user: str | None = "user-{}", **fields: object
) -> list[Answer | BaseException]:
    """One request of each of ``n`` users, all at once; what the versions' answers were like is in the store on return.

    ``user`` None: they do not say who they are.
    """
    chat = chat or service(world)
    asked = [ChatRequest(POLICY, ASK, user=user and user.format(first + i), **fields) for i in range(n)]  # type: ignore[arg-type]

    async def all_of_them() -> list[Answer | BaseException]:
        return await asyncio.gather(*map(chat.answer, asked), return_exceptions=True)

    replies = asyncio.run(all_of_them())
    written = chat.recorder.flush()
    if written is not None:
        written.result()
    return replies
