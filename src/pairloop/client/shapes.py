"""Our own resources as they stand on the wire, for both of its ends. Times are Unix seconds."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel


class PolicyResource(BaseModel):
    """A lineage of versions, and what its aliases name."""

    object: Literal["policy"] = "policy"
    id: str
    model: str
    method: str
    champion: str | None
    challenger: str | None
    canary: str | None
    versions: int
    groups: int


class VersionResource(BaseModel):
    object: Literal["version"] = "version"
    id: str
    policy: str
    number: int
    kind: str
    parent: str | None
    aliases: list[str]
    dataset_id: str | None
    run_id: str | None
    artifact_hash: str
    created_at: int
    erased_rows: int = 0
    """Rows it was trained on that rested on people who were erased since."""
    erased_ancestors: list[str] = []
    """Versions it descends from that have such rows."""


class ErasureResource(BaseModel):
    """What an erasure took, by noun; of a preview (`id` null) what it would take. Who it was about is nowhere written."""

    object: Literal["erasure"] = "erasure"
    id: str | None
    reason: str | None
    counts: dict[str, int]
    versions: dict[str, int] = {}
    """Versions that had seen the person, and how many rows."""
    datasets: dict[str, str] = {}
    """Datasets that held rows of theirs, and what is left of each."""
    scrubbed: bool | None = None
    """Whether the bytes are gone from the database's file, too; false where it is large: `pairloop erase --scrub`."""
    created_at: int | None


class StepResource(BaseModel):
    state: str
    record: dict[str, Any]
    created_at: int


class CycleResource(BaseModel):
    object: Literal["cycle"] = "cycle"
    id: str
    policy: str
    number: int
    state: str
    parent: str
    trigger: str
    created_at: int
    steps: list[StepResource]


class DatasetResource(BaseModel):
    object: Literal["dataset"] = "dataset"
    id: str
    policy: str
    path: str
    n_train: int
    n_heldout: int
    counts: dict[str, int]
    dropped: dict[str, int]
    created_at: int


class DuelResource(BaseModel):
    object: Literal["duel"] = "duel"
    id: str
    cycle_id: str
    policy: str
    kind: Literal["gate", "seed"]
    champion: str
    challenger: str
    picks: int
    opened_at: int
    closed_at: int | None


class ReasonResource(BaseModel):
    """``observed``: the figure that the rule looked at; where it compares one end of an interval with ``threshold``, that end.
    ``text`` has the interval."""

    rule: str
    passed: bool | None
    text: str
    observed: float | None
    threshold: float | None


class VerdictResource(BaseModel):
    kind: str
    text: str
    reasons: list[ReasonResource]
    e_value: float
    wins: int
    losses: int
    ties: int
    raters: int
    win_rate: float
    ci95: tuple[float, float]
    created_at: int


class GateResource(BaseModel):
    """What the gate said about one cycle's challenger; ``verdict`` is its latest word, ``history`` all of them."""

    object: Literal["gate"] = "gate"
    id: str
    cycle_id: str
    verdict: VerdictResource
    history: list[VerdictResource]


class GuardsResource(BaseModel):
    """What the live guards say of the version under watch beside ``former``; no version where nobody is."""

    object: Literal["guards"] = "guards"
    id: str
    version: str | None
    former: str | None
    answers: int
    since: int | None
    broken: str | None
    reasons: list[ReasonResource]


class QuarantineResource(BaseModel):
    """Why a rater's votes are set aside, and since when."""

    reason: str
    created_at: int


class RaterResource(BaseModel):
    """Someone who gave feedback; ``pool`` says whether their picks train or judge."""

    object: Literal["rater"] = "rater"
    id: str
    pool: Literal["train", "gate"]
    feedback: int
    first_at: int
    last_at: int
    quarantine: QuarantineResource | None


class ShareResource(BaseModel):
    """``k`` of ``n`` picks, beside the share expected; ``p`` is adjusted for all tests made."""

    k: int
    n: int
    expected: float
    p: float


class CheckedRater(BaseModel):
    """A rater with the tests that could be made and what they flag."""

    id: str
    picks: int
    instant: int
    shares: dict[str, ShareResource]
    flags: list[str]
    quarantine: QuarantineResource | None


class FlipRateResource(BaseModel):
    """How often a pick says the opposite of what was meant, from comparisons shown twice, sides swapped."""

    pairs: int
    disagreements: int
    rate: float
    ci95: tuple[float, float]
    label_smoothing: float


class RaterChecks(BaseModel):
    """The raters of the newest picks, those with the most first."""

    object: Literal["rater_checks"] = "rater_checks"
    data: list[CheckedRater]
    flip_rate: FlipRateResource | None


class DuelCount(BaseModel):
    """An open duel's votes that count, and their evidence for the challenger."""

    wins: int
    losses: int
    e_value: float


class RaterDecision(BaseModel):
    """A quarantine or release and what it changes, or with ``dryrun`` would.

    ``pairs`` of the next snapshot rest on this rater.
    """

    object: Literal["rater.decision"] = "rater.decision"
    rater_id: str
    action: Literal["quarantine", "release"]
    picks: int
    pairs: int
    duel_before: DuelCount | None
    duel_after: DuelCount | None
    dryrun: bool


class QueueChoice(BaseModel):
    """One of the two answers, by its index."""

    index: int
    text: str


class QueueItem(BaseModel):
    """A comparison to show: ``choices`` in the order of the places. The pick sends ``shown_order`` and ``repeat`` along."""

    inference_id: str
    messages: list[dict[str, Any]]
    choices: list[QueueChoice]
    shown_order: list[int]
    repeat: bool


class Queue(BaseModel):
    """What a rater should look at next; ``item`` is null where there is nothing."""

    object: Literal["queue"] = "queue"
    item: QueueItem | None


class AnswerFacts(BaseModel):
    """What is told of an answer without its text; ``version`` is null where a duel is not to be unblinded."""

    version: str | None
    tokens: int
    finish_reason: str


class FeedbackLineage(BaseModel):
    """What became of one feedback row: its use, the datasets and versions that hold it, the oldest first."""

    object: Literal["feedback.lineage"] = "feedback.lineage"
    id: str
    inference_id: str
    metric_name: str
    label: str | None
    use: str
    """trained, training, waiting, left_out, judged, examines or noted."""
    reason: str | None
    versions: list[str]
    serving: bool
    """Whether one of the versions, or one that descends from it, is the champion."""
    datasets: list[str]
    duel_id: str | None
    """Of what is no pick: once the duel has ended."""
    answers: list[AnswerFacts]


class Lineage(BaseModel):
    """The rows that were asked for, in the order of their ids."""

    object: Literal["list"] = "list"
    data: list[FeedbackLineage]


class ReservationItem(BaseModel):
    """A comparison that is one rater's until ``expires_at``: ``choices`` in the order of the places."""

    id: str
    inference_id: str
    messages: list[dict[str, Any]]
    choices: list[QueueChoice]
    shown_order: list[int]
    expires_at: int


class Reservation(BaseModel):
    """What a rater labels next; ``item`` is null where there is nothing."""

    object: Literal["queue.reservation"] = "queue.reservation"
    item: ReservationItem | None


class ReservationEnd(BaseModel):
    """A comparison that went back to the queue; ``deleted`` is false where its rater had answered, or it was gone."""

    object: Literal["queue.reservation.deleted"] = "queue.reservation.deleted"
    id: str
    deleted: bool


class GoldResource(BaseModel):
    """A comparison whose answer is known: the better one by its index, who knows it, and why."""

    object: Literal["queue.gold"] = "queue.gold"
    id: str
    chosen_index: int
    origin: Literal["operator", "unanimous"]
    reason: str
    created_at: int


class AgreedItem(BaseModel):
    """A comparison of which ``raters`` people said the same, and nobody anything else."""

    inference_id: str
    chosen_index: int
    raters: int


class UnanimousGold(BaseModel):
    """The comparisons that became gold because all agreed, or with ``dryrun`` would."""

    object: Literal["queue.gold.unanimous"] = "queue.gold.unanimous"
    data: list[AgreedItem]
    dryrun: bool


class ScheduleSetting(BaseModel):
    """A setting of the schedule, and the file's own value. ``origin``: ``default``, ``file``, the environment variable, or
    ``set``; then by whom, when and why."""

    value: bool | int | str | None
    file_value: bool | int | str | None
    origin: str
    set_by: str | None
    set_at: int | None
    reason: str | None


class ScheduleResource(BaseModel):
    """When the cycles of a policy begin: by a clock, a cron line, new pairs, or the pending trigger.

    ``runs``: the next times of the clock, if each cycle begins on time. ``due``: why one begins as soon as none is open.
    ``text``: all that in a sentence. ``dryrun``: it is not so, but would be.
    """

    object: Literal["schedule"] = "schedule"
    id: str
    policy: str
    enabled: bool
    every: str | None
    cron: str | None
    min_pairs: int
    pending: str | None
    last_started_at: int | None
    next_run_at: int | None
    runs: list[int]
    due: str | None
    text: str
    settings: dict[str, ScheduleSetting]
    dryrun: bool = False


class KeyResource(BaseModel):
    """A key, without its secret, of which only a hash is stored."""

    object: Literal["key"] = "key"
    id: str
    name: str
    scopes: list[str]
    requests_per_minute: int | None
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    revoked_at: int | None


class NewKeyResource(KeyResource):
    """A key that was just made, with its token: this once."""

    token: str


class AccountResource(BaseModel):
    """A person's account; ``id`` is its name."""

    object: Literal["account"] = "account"
    id: str
    role: str
    scopes: list[str]
    created_at: int
    last_login_at: int | None


class SessionResource(BaseModel):
    """A sign-in on the pages; ``owner``: ``account:<name>`` or ``key:<id>``."""

    object: Literal["session"] = "session"
    id: str
    owner: str
    address: str
    created_at: int
    used_at: int
    expires_at: int


class AuditResource(BaseModel):
    """An act: who did what to the loop, and why."""

    object: Literal["audit"] = "audit"
    id: str
    actor: str
    action: str
    subject: str
    reason: str
    details: dict[str, Any]
    created_at: int


class FeedbackReceipt(BaseModel):
    """What was recorded; ``versions`` per index where telling them unblinds no duel."""

    feedback_id: str
    inference_id: str
    duplicate: bool
    revision: int
    versions: list[str | None] | None = None
    dryrun: bool = False


class Triggered(BaseModel):
    object: Literal["cycle.trigger"] = "cycle.trigger"
    policy: str
    reason: str
    running: CycleResource | None


class Moved(BaseModel):
    """An alias that was moved by hand."""

    object: Literal["promotion"] = "promotion"
    action: str
    champion: str
    previous: str | None
    reason: str
    canary: str | None = None
    canary_share: float | None = None


Item = TypeVar("Item", bound=BaseModel)


class Page(BaseModel, Generic[Item]):
    """A page of a list; the next one is asked for with ``after`` = ``last_id``."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool
