"""What was asked and answered: sampling settings, completions, groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from pairloop.types.conversation import Prompt


class Pool(StrEnum):
    """Raters are split once, by a hash: the train pool's picks train, the gate pool's picks only judge."""

    TRAIN = "train"
    GATE = "gate"


class GroupKind(StrEnum):
    """``train`` and ``heldout``: all completions from one version; ``duel``: one of the champion, one of the challenger;
    ``shadow``: what another version would have said, which nobody was shown."""

    TRAIN = "train"
    HELDOUT = "heldout"
    DUEL = "duel"
    IMPORTED = "imported"
    SHADOW = "shadow"


class FinishReason(StrEnum):
    """Why a completion ended; a group whose client went away holds ABANDONED completions and cannot be picked.

    ERASED ones have neither text nor tokens any more: someone deleted them.
    """

    STOP = "stop"
    LENGTH = "length"
    ABANDONED = "abandoned"
    ERASED = "erased"


GREEDY_BELOW = 1e-4
"""Temperatures below this take the likeliest token: the quotient of the logits would overflow, and draws nothing else."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn. Recorded log-probs are raw (T = 1, whole vocabulary) whatever these say."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    is_constrained: bool = False
    """Whether a response format forbade tokens."""

    @property
    def is_tempered(self) -> bool:
        """True when the sampling distribution is not the policy itself."""
        return self.temperature != 1.0 or self.top_p < 1.0 or self.is_constrained

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def is_repeatable(self) -> bool:
        """True when a version asked again gives the same answer: seeded, greedy, or a nucleus of one token."""
        return self.seed is not None or self.is_greedy or self.top_p < GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: its text, the sampled token ids and their raw float32 log-probs under the version that sampled it.

    A completion that ended with ``stop`` by its end-of-sequence token contains that token and its log-prob; a truncated one
    does not. Imported completions have no token ids, no log-probs, and no version. ``is_redacted``: something was taken out of
    the text before it was stored; what is left has no token ids.

    ``first_token_ms``, ``total_ms``: from the request's arrival until the client could see the first token (of a stream) and
    until the last one was sampled; None where nobody looked at a clock. Equal answers may have taken different times.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    version: int | None = None
    finish_reason: FinishReason = FinishReason.STOP
    is_redacted: bool = False
    first_token_ms: int | None = field(default=None, compare=False)
    total_ms: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt with G >= 1 completions: the one currency of the loop."""

    group_id: str
    policy: str
    kind: GroupKind
    pool: Pool
    prompt: Prompt
    completions: tuple[Completion, ...]
    created_at: datetime
    prompt_token_ids: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    user: str | None = None
    conversation_id: str | None = None
    parent_group_id: str | None = None
    parent_index: int | None = None
    duel_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_abandoned(self) -> bool:
        return not self.completions or any(c.finish_reason is FinishReason.ABANDONED for c in self.completions)

    @property
    def is_erased(self) -> bool:
        return any(c.finish_reason is FinishReason.ERASED for c in self.completions)

    @property
    def rater_id(self) -> str:
        """Who asked, and so who picks unless a pick names someone."""
        return rater_of(self.user, self.conversation_id, self.group_id)


def rater_of(user: str | None, conversation_id: str | None, group_id: str) -> str:
    """Whom a group counts for: the user, else the conversation (never everybody)."""
    return user or f"conversation:{conversation_id or group_id}"
