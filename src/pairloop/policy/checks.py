"""What can never be sampled, whatever the engine."""

from __future__ import annotations

from pairloop.errors import InvalidRequestError
from pairloop.policy.protocols import SampleRequest


def room(request: SampleRequest, *, max_context: int, vocab_size: int) -> int:
    """Tokens that are left for the answer; InvalidRequestError names the field that is wrong."""
    size = len(request.prompt_token_ids)
    if size >= max_context:
        raise InvalidRequestError(
            f"the prompt has {size} tokens, the context holds {max_context} with the answer; shorten it",
            param="messages",
            code="context_length_exceeded",
        )
    if request.n < 1:
        raise InvalidRequestError("n must be at least 1", param="n")
    if request.params.max_tokens < 1:
        raise InvalidRequestError("max_tokens must be at least 1", param="max_tokens")
    if not 0.0 <= request.params.temperature < float("inf"):
        raise InvalidRequestError("temperature must be at least 0", param="temperature")
    if not 0.0 < request.params.top_p <= 1.0:
        raise InvalidRequestError("top_p must be above 0 and at most 1", param="top_p")
    check_tokens(request.prompt_token_ids, vocab_size)
    return max_context - size


def check_tokens(token_ids: tuple[int, ...], vocab_size: int) -> None:
    if not token_ids:
        raise InvalidRequestError("the prompt has no tokens", param="messages")
    if not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise InvalidRequestError(f"token ids must be in [0, {vocab_size})", param="messages")
