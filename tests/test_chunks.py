"""Streams say what the whole answer says, wherever tokens, stop strings and batches happen to be cut."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server import sse_chunks

from pairloop.policy.fake import EOS, FakeTokens
from pairloop.policy.protocols import TokenEvent
from pairloop.policy.text import TextStream
from pairloop.types import Completion, FinishReason, Group, GroupKind, Message, Pool, SamplingParams
from pairloop.web.chunks import Chunks
from pairloop.web.replies import Head, token_logprobs

TEXT = st.text(alphabet="abé€x", max_size=12)
STOPS = st.lists(st.text(alphabet="abé€", min_size=1, max_size=4), max_size=3)


def sampled(text: str, stops: Sequence[str], *, index: int, early: bool, torn: bool) -> tuple[Completion, list[TokenEvent]]:
    """The tokens (bytes) of ``text`` up to its first stop string, as an engine tells them.

    ``early``: the engine says each byte at once, those of a stop string too; else it holds back what may be one, as the local
    engine does.
    ``torn``: the model leaves its last character unfinished.
    """
    stream = TextStream(FakeTokens().decode, tuple(stops))
    events, logps, ids = [], [], []
    tokens = (*(text.encode()[:-1] if torn else text.encode()), EOS)
    for place, token in enumerate(tokens):
        piece = stream.add(token, last=place == len(tokens) - 1)
        ids.append(token)
        logps.append(-float(place))
        events.append(TokenEvent(index, token, -float(place), piece))
        if stream.stopped:
            break
    if early:
        said = TextStream(FakeTokens().decode)
        events = [
            TokenEvent(index, e.token_id, e.logp, said.add(e.token_id, last=i == len(ids) - 1)) for i, e in enumerate(events)
        ]
    return Completion(stream.text, tuple(ids), tuple(logps), 0, FinishReason.STOP), events


@settings(deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=3), stops=STOPS, early=st.booleans(), torn=st.booleans(), data=st.data())
def test_a_stream_is_its_answer(texts: list[str], stops: list[str], early: bool, torn: bool, data: st.DataObject) -> None:
    made = [sampled(text, stops, index=index, early=early, torn=torn) for index, text in enumerate(texts)]
    group = Group(
        "chatcmpl-01890000-0000-7000-8000-000000000000",
        "bot",
        GroupKind.TRAIN,
        Pool.TRAIN,
        (Message("user", "hi"),),
        tuple(completion for completion, _ in made),
        datetime.now(UTC),
        sampling=SamplingParams(stop=tuple(stops)),
    )
    head = Head(group.group_id, 0, "bot@0", "fp_0")
    chunks = Chunks(head, group, len(made), FakeTokens(), with_logprobs=True, with_usage=True)
    written = chunks.opening()
    for batch in batches([events for _, events in made], data):
        written += chunks.tokens(batch)
    *spoken, usage = sse_chunks(written + chunks.closing(group))
    assert usage["choices"] == []
    for index, (completion, _) in enumerate(made):
        mine = [chunk["choices"][0] for chunk in spoken if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == completion.text
        entries = [entry for choice in mine for entry in choice.get("logprobs", {}).get("content", [])]
        assert entries == token_logprobs(completion.text, made[index][1], frozenset({EOS})), "as the whole answer has them"
        assert "".join(entry["token"] for entry in entries) == completion.text
        assert [entry["logprob"] for entry in entries] == list(completion.logps[: len(entries)])
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert [choice["delta"].get("role") for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)


def batches(sides: list[list[TokenEvent]], data: st.DataObject) -> list[list[TokenEvent]]:
    """The events of all sides, each in its own order, interleaved and cut into batches."""
    waiting: list[list[Any]] = [list(events) for events in sides]
    cut: list[list[TokenEvent]] = [[]]
    while any(waiting):
        side = data.draw(st.sampled_from([i for i, events in enumerate(waiting) if events]))
        cut[-1].append(waiting[side].pop(0))
        if data.draw(st.booleans()):
            cut.append([])
    return cut
