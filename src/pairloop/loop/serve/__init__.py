"""Serve: one request becomes one group, recorded before it is answered.

A bare policy name is answered by the champion. A comparison (two answers) is, by the rater's pool: both from the champion
(train pool, or gate pool without a duel), or one of the champion and one of the challenger, a fair coin deciding which comes
first (gate pool while a duel is open). A request with a seed, with a temperature or top-p below .5, or for log-probs gets
no duel: anyone could repeat it with ``name@champion`` and know the sides before the pick. A streamed duel sends the tokens of
both sides in step, since the pace of a side would tell its version. A request that names a version itself (``name@12``) never
trains and never duels, whoever asks: its group is ``heldout`` in the gate pool. Which versions answer is read once per
request, in one transaction, so the completions of a group never straddle a swap.
"""

from pairloop.loop.serve.calls import MAX_CALLS, call_id
from pairloop.loop.serve.plan import CONVERSATION_KEY, PARENT_KEY, Plan, pool_of
from pairloop.loop.serve.request import ChatRequest
from pairloop.loop.serve.routing import version_called
from pairloop.loop.serve.service import ChatService
from pairloop.loop.serve.stream import Answer, AnswerStream

__all__ = [
    "CONVERSATION_KEY",
    "MAX_CALLS",
    "PARENT_KEY",
    "Answer",
    "AnswerStream",
    "ChatRequest",
    "ChatService",
    "Plan",
    "call_id",
    "pool_of",
    "version_called",
]
