"""The vocabulary: frozen dataclasses and enums that every room speaks.

Standard library only. Axis letters in comments: B groups in the batch, G completions in a group, T tokens.
Ids carry their noun; times are timezone-aware UTC with the suffix ``_at``; durations end in ``_s``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple, Self

BASE_VERSION = 0
"""Version 0 of every policy is its base model."""


class Label(StrEnum):
    """What someone said about a comparison; A is index 0 and B is index 1 of the group."""

    A = "A"
    B = "B"
    TIE = "TIE"
    BOTH_BAD = "BOTH_BAD"
    SKIP = "SKIP"


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


class Source(StrEnum):
    """Who gave the feedback: a person, a verifier or code scorer, or a language model judge."""

    HUMAN = "human"
    CODE = "code"
    LLM = "llm"


class FinishReason(StrEnum):
    """Why a completion ended; a group whose client went away holds ABANDONED completions and cannot be picked.

    ERASED ones have neither text nor tokens any more: someone deleted them.
    """

    STOP = "stop"
    LENGTH = "length"
    ABANDONED = "abandoned"
    ERASED = "erased"


class VerdictKind(StrEnum):
    CONTINUE = "CONTINUE"
    PROMOTE = "PROMOTE"
    HOLD = "HOLD"
    REJECT = "REJECT"


class CycleState(StrEnum):
    """Where a cycle stands; each move is one appended record."""

    BUILDING = "building"
    TRAINING = "training"
    CHECKING = "checking"
    DUELLING = "duelling"
    CANARY = "canary"
    PROMOTED = "promoted"
    HELD = "held"
    REJECTED = "rejected"
    NOTHING_TO_TRAIN = "nothing_to_train"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL_CYCLE_STATES

    @property
    def is_waiting(self) -> bool:
        """Whether the cycle waits for people, and holds no lease."""
        return self in (CycleState.DUELLING, CycleState.CANARY)


_TERMINAL_CYCLE_STATES = frozenset(
    {CycleState.PROMOTED, CycleState.HELD, CycleState.REJECTED, CycleState.NOTHING_TO_TRAIN, CycleState.FAILED}
)


class RunStatus(StrEnum):
    """A training run's status; the two error states say whose fault it was. ``CANCELLED``: with its cycle, by hand."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    NOTHING_TO_TRAIN = "nothing_to_train"
    USER_ERROR = "user_error"
    SYSTEM_ERROR = "system_error"
    CANCELLED = "cancelled"


class Alias(StrEnum):
    CHAMPION = "champion"
    CHALLENGER = "challenger"
    CANARY = "canary"


class VersionKind(StrEnum):
    BASE = "base"
    FULL = "full"
    ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant turn asked to be called; ``arguments`` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. An assistant's may call tools; a turn of role ``tool`` answers the call ``tool_call_id``."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The turn in the OpenAI shape; what it does not have is left out."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn

    @classmethod
    def from_dict(cls, turn: Mapping[str, Any]) -> Self:
        """The turn that `as_dict` wrote."""
        calls = (
            ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in turn.get("tool_calls", ())
        )
        return cls(turn["role"], turn["content"], tuple(calls), turn.get("tool_call_id"))


Prompt = tuple[Message, ...] | str
"""A conversation, rendered by the model's chat template, or a plain string, used as it is.

Tools are part of what the model reads: a conversation that offers some begins with a message of role `TOOLS_ROLE` whose content
is their list as JSON, so that whatever stores, compares or hashes prompts tells two sets of tools apart.
"""

TOOLS_ROLE = "tools"


def with_tools(tools: Sequence[Mapping[str, Any]], turns: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation ``turns`` that offers ``tools`` (in the OpenAI shape); without any, the turns alone."""
    if not tools:
        return tuple(turns)
    return Message(TOOLS_ROLE, json.dumps(list(tools), ensure_ascii=False)), *turns


def offered_tools(prompt: Prompt) -> list[dict[str, Any]]:
    """The tools that the conversation offers, in the OpenAI shape."""
    if isinstance(prompt, str) or not prompt or prompt[0].role != TOOLS_ROLE:
        return []
    tools: list[dict[str, Any]] = json.loads(prompt[0].content)
    return tools


def spoken(prompt: Sequence[Message]) -> tuple[Message, ...]:
    """The turns of the conversation, without the tools that it offers."""
    return tuple(message for message in prompt if message.role != TOOLS_ROLE)


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


PREFERENCE_METRIC = "preference"
THUMBS_METRIC = "thumbs"
SCORE_METRIC = "score"
COMMENT_METRIC = "comment"
DEMONSTRATION_METRIC = "demonstration"
ERROR_METRIC = "error"
"""A verifier or judge failed on the group: no vote, and no tie."""
REPEAT_METRIC = "repeat"
"""A comparison shown to its rater once more, sides swapped: it measures how often picks are flipped, and is no vote."""
GOLD_METRIC = "gold"
"""A comparison whose answer is known, shown by the labelling queue: it measures its rater, and is no vote."""
OUR_NAMES = "pairloop."
"""How the names of tags and metadata begin that are the server's own: no client may say what they say."""
REDACTED_TAG = f"{OUR_NAMES}redacted"
"""The tag of a feedback row that says something was taken out of its value before it was stored."""
RELABELLED_TAG = f"{OUR_NAMES}relabelled_by"
"""The tag of a feedback row that an operator wrote in its rater's place: who it was."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """One immutable feedback row: a pick (metric ``preference``, with a label) or a value about one completion.

    Unique by (rater, group, metric, choice): a later row with a higher revision replaces the earlier ones, which stay.
    """

    feedback_id: str
    group_id: str
    metric: str
    source: Source
    rater_id: str
    created_at: datetime
    label: Label | None = None
    choice_index: int | None = None
    value: float | bool | str | None = None
    text: str | None = None
    shown_order: tuple[int, ...] = ()
    latency_ms: int | None = None
    revision: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LabelledGroup:
    """A group with the feedback that counts (latest revisions): what the pair builder consumes.

    ``earlier``: ids of those rows that were known to an earlier round. They say what the new ones stand against, and make no
    pair of their own.
    """

    group: Group
    feedback: tuple[Feedback, ...]
    earlier: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PairSide:
    """A side of a preference pair, or an answer of a training group. Empty ``token_ids`` means: tokenize the text."""

    text: str
    token_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A group of two with rewards (1, 0), with its lineage.

    ``sampled_by`` is the version that sampled both sides, or None where the sides were not sampled by one version of the
    policy (imported rows, edits). ``log-probs`` recorded at sampling are the reference's only where ``sampled_by`` is the
    parent of the training run.
    """

    pair_id: str
    prompt: Prompt
    chosen: PairSide
    rejected: PairSide
    source: Source = Source.HUMAN
    prompt_token_ids: tuple[int, ...] = ()
    sampled_by: int | None = None
    tempered: bool = False
    weight: float = 1.0
    group_ids: tuple[str, ...] = ()
    feedback_ids: tuple[str, ...] = ()

    @property
    def row_id(self) -> str:
        return self.pair_id


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """A prompt and its answers with a reward each, with its lineage: what a preference pair is, for any G >= 1.

    One answer with reward 1 is a demonstration, an ideal answer that somebody wrote or confirmed; several are a scored group.
    ``sampled_by``: see `PreferencePair`. ValueError unless each answer has one reward.
    """

    row_id: str
    prompt: Prompt
    answers: tuple[PairSide, ...]
    rewards: tuple[float, ...] = (1.0,)
    source: Source = Source.HUMAN
    prompt_token_ids: tuple[int, ...] = ()
    sampled_by: int | None = None
    tempered: bool = False
    weight: float = 1.0
    group_ids: tuple[str, ...] = ()
    feedback_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.answers or len(self.answers) != len(self.rewards):
            raise ValueError(f"{self.row_id}: {len(self.answers)} answers with {len(self.rewards)} rewards")

    @property
    def is_demonstration(self) -> bool:
        return len(self.answers) == 1


TrainingRow = PreferencePair | TrainingGroup
"""What a snapshot holds: preference pairs, demonstrations, scored groups."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A snapshot of training rows: an immutable, hash-named folder (JSONL and manifest) and its counts.

    ``counts`` maps what was kept; ``dropped`` maps each reason to the number of feedback rows it set aside.
    """

    dataset_id: str
    policy: str
    path: str
    n_train: int
    n_heldout: int
    counts: Mapping[str, int]
    dropped: Mapping[str, int]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Version:
    """An immutable member of a policy's lineage: version 0 is the base, numbers count up and are never reused.

    What a fine-tuning job made has its ``job_id`` and is also known by its ``model_name`` (``ft:...``); a checkpoint of one
    has the ``step_number`` after which it was taken, and the ``metrics`` of then. ``record``: its own recipe and result, since
    a folder of the same bytes may be another version's too, whose manifest it then has.
    """

    policy: str
    number: int
    kind: VersionKind
    path: str
    artifact_hash: str
    parent: int | None
    dataset_id: str | None
    run_id: str | None
    created_at: datetime
    job_id: str | None = None
    step_number: int | None = None
    model_name: str | None = None
    metrics: Mapping[str, float] | None = None
    record: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.policy}@{self.number}"


@dataclass(frozen=True, slots=True)
class Run:
    """A training run: who holds it, how far it is, and how it ended."""

    run_id: str
    policy: str
    cycle_id: str | None
    dataset_id: str
    parent: int
    status: RunStatus
    owner: str
    attempt: int
    lease_expires_at: datetime
    heartbeat_at: datetime
    progress: Mapping[str, Any]
    result: Mapping[str, Any]
    error: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class CycleStep:
    """One recorded move of a cycle: the state it entered and the record of the stage that led there."""

    state: CycleState
    record: Mapping[str, Any]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Cycle:
    """One turn of the loop for one policy; its state is that of its last step."""

    cycle_id: str
    policy: str
    number: int
    parent: int
    trigger: str
    created_at: datetime
    steps: tuple[CycleStep, ...]

    @property
    def state(self) -> CycleState:
        return self.steps[-1].state

    def record(self, state: CycleState) -> Mapping[str, Any] | None:
        """The record with which the cycle entered ``state``, or None where it has not been there."""
        return next((step.record for step in self.steps if step.state is state), None)


class DuelKind(StrEnum):
    """``gate``: against the champion, it decides about the promotion; ``seed``: beside it, against the base."""

    GATE = "gate"
    SEED = "seed"


@dataclass(frozen=True, slots=True)
class Duel:
    """Live comparisons of challenger and champion in the gate pool; closed by its cycle's verdict.

    In a seed duel the base stands in the champion's place.
    """

    duel_id: str
    cycle_id: str
    policy: str
    champion: int
    challenger: int
    opened_at: datetime
    closed_at: datetime | None = None
    kind: DuelKind = DuelKind.GATE


@dataclass(frozen=True, slots=True)
class DuelPick:
    """One vote of a duel: +1 for the challenger, -1 for the champion, 0 for tie, both-bad or skip.

    ``is_first``: whether the challenger's answer was shown in the first place. ``length_ratio``: its characters over those of
    the champion's. Both are None where nobody was shown anything. ``slices``: the metadata that the duel is looked at by.
    """

    rater_id: str
    outcome: int
    created_at: datetime
    is_first: bool | None = None
    length_ratio: float | None = None
    slices: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Reason:
    """One rule of the gate, in words and numbers. ``passed`` is None where the rule is still open."""

    rule: str
    passed: bool | None
    text: str
    observed: float | None = None
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's answer. Only PROMOTE changes what customers see."""

    kind: VerdictKind
    reasons: tuple[Reason, ...]
    e_value: float = 1.0
    wins: int = 0
    losses: int = 0
    ties: int = 0
    raters: int = 0

    @property
    def text(self) -> str:
        return "; ".join(reason.text for reason in self.reasons)


class Interval(NamedTuple):
    """A point estimate with its 95 % interval and the number of observations behind it."""

    mean: float
    lo: float
    hi: float
    n: int


def messages_as_dicts(prompt: Sequence[Message]) -> list[dict[str, Any]]:
    """The turns in the OpenAI shape, without the tools that the conversation offers."""
    return [message.as_dict() for message in spoken(prompt)]
