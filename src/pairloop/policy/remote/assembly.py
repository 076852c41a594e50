"""From the chunks of one request to its completions: text by our own tokenizer, token events as they come."""

from __future__ import annotations

from dataclasses import dataclass, field

from pairloop.policy.protocols import SampleRequest, TokenEvent, Tokens, TopToken
from pairloop.policy.remote.wire import GarbageError, Piece, ReplicaUnavailableError, Token
from pairloop.policy.text import TextStream
from pairloop.types import Completion, FinishReason

_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


@dataclass(slots=True)
class _Row:
    stream: TextStream | None
    """None where nobody looks at the text before its end."""
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    reason: FinishReason | None = None

    @property
    def is_stopped(self) -> bool:
        """True where the text holds a stop string."""
        return self.stream is not None and self.stream.stopped


class Assembly:
    """One attempt at a request. ``asked`` is the n that the engine is asked for; ``told`` turns true with the first event.

    A greedy request is asked once, as its completions are all alike (and vLLM takes no other); they are told apart by index
    only. The text is cut at stop strings here as the engine does it, so that the tokens' texts add up to it.
    """

    def __init__(self, request: SampleRequest, tokens: Tokens) -> None:
        self._request = request
        self._tokens = tokens
        self.asked = 1 if request.params.is_greedy else request.n
        self._copies = request.n // self.asked
        watched = request.on_token is not None or request.params.stop
        self._rows = [_Row(TextStream(tokens.decode, request.params.stop) if watched else None) for _ in range(self.asked)]
        self.told = False

    @property
    def is_whole(self) -> bool:
        return all(row.reason is not None for row in self._rows)

    def add(self, piece: Piece) -> None:
        """Take what a chunk adds.

        GarbageError where a completion goes on after its end, ReplicaUnavailableError where it was cut.
        """
        row = self._rows[piece.index]
        if piece.finish is not None and piece.finish not in _REASONS:
            raise ReplicaUnavailableError(f"the engine gave the request up ({piece.finish})")
        if row.reason is not None:
            if piece.tokens and not row.is_stopped:
                raise GarbageError(f"completion {piece.index} goes on after its end")
            return
        for place, token in enumerate(piece.tokens):
            last = piece.finish is not None and place + 1 == len(piece.tokens)
            self._token(piece.index, row, token, last=last)
            if row.is_stopped:
                row.reason = FinishReason.STOP
                return
        if piece.finish is not None:
            if not row.token_ids:
                raise GarbageError(f"completion {piece.index} ended without a token")
            row.reason = _REASONS[piece.finish]

    def completions(self, *, recorded: bool) -> tuple[Completion, ...]:
        """The completions, with their log-probs where ``recorded``; GarbageError where the stream ended before they did.

        Under a response format the engine tells the log-probs of what the format left over, which are not the policy's.
        """
        if not self.is_whole:
            missing = sum(row.reason is None for row in self._rows)
            raise GarbageError(f"the stream ended before {missing} of {self.asked} completions did")
        keep = recorded and self._request.response_format is None
        return tuple(self._completion(row, keep) for row in self._rows for _ in range(self._copies))

    def _completion(self, row: _Row, keep: bool) -> Completion:
        assert row.reason is not None
        logps = tuple(row.logps) if keep else ()
        text = row.stream.text if row.stream is not None else self._tokens.decode(row.token_ids)
        return Completion(text, tuple(row.token_ids), logps, self._request.version, row.reason)

    def _token(self, index: int, row: _Row, token: Token, *, last: bool) -> None:
        row.token_ids.append(token.token_id)
        row.logps.append(token.logp)
        if row.stream is None:
            return
        top = tuple(TopToken(other, logp, row.stream.would_add(other)) for other, logp in token.top)
        text = row.stream.add(token.token_id, last=last)
        if self._request.on_token is None:
            return
        for copy in range(self._copies):
            self.told = True
            self._request.on_token(TokenEvent(index + copy, token.token_id, token.logp, text, top))
