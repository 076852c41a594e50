"""The tables. Portable SQL only; what SQLite alone needs is in database.py.

Evidence (groups, completions, feedback, datasets and their lineage, versions, promotions, cycle steps, verdicts, quarantines,
the audit trail, schedule changes, events) is only ever inserted. What changes in place: aliases, leases, triggers, a run's
progress and end, the closing of a duel or canary, the traffic of a minute that is not over (an outage of the engine takes
errors back), a key's last use and revocation, accounts and sessions, what the labelling queue shows to whom and which items are
gold, a fine-tuning job until it has ended, a webhook's delivery, what the wire shows of a group, why a feedback row is not used
so far; and the texts of a group that was deleted and the names of an erased person, which is recorded, with a version's sample
answers to it (those of an earlier report on the version go with the next one). Stored replies and reservations are deleted
after a day, traffic after a month.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    true,
)

from pairloop.store.columns import JsonText, LogProbs, TokenIds, UtcDateTime

# Named, so that a later migration can drop or change a constraint on any database.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite counts up by itself only in a column of type INTEGER; elsewhere 32 bits would run out.
_Sequence = BigInteger().with_variant(Integer(), "sqlite")

groups = Table(
    "groups",
    metadata,
    Column("group_id", String(255), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("pool", String(16), nullable=False),
    Column("prompt", JSON, nullable=False),
    Column("prompt_hash", String(32), nullable=False),
    Column("prompt_token_ids", TokenIds, nullable=False),
    Column("sampling", JSON, nullable=False),
    Column("user", Text),
    Column("conversation_id", Text),
    Column("parent_group_id", String(255)),
    Column("parent_index", Integer),
    Column("duel_id", String(64), ForeignKey("duels.duel_id")),
    Column("metadata", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "policy", "created_at"),
    Index(None, "policy", "pool", "created_at"),
    Index(None, "duel_id"),
    Index(None, "conversation_id"),
)

completions = Table(
    "completions",
    metadata,
    Column("group_id", String(255), ForeignKey("groups.group_id"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("text", Text, nullable=False),
    Column("token_ids", TokenIds, nullable=False),
    Column("logps", LogProbs, nullable=False),
    Column("version", Integer),
    Column("finish_reason", String(16), nullable=False),
    # A hash of policy, user and text with the group's time: finds the answer that a conversation goes on from in one probe.
    Column("answer_key", String(32), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    # NULL says no.
    Column("is_redacted", Boolean),
    # From the request's arrival; NULL where nobody looked at a clock.
    Column("first_token_ms", Integer),
    Column("total_ms", Integer),
    Index(None, "answer_key", "created_at"),
)

stored_completions = Table(
    "stored_completions",
    metadata,
    Column("group_id", String(255), ForeignKey("groups.group_id"), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("model", String(128), nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("is_listed", Boolean, nullable=False),
    Column("deleted_at", UtcDateTime),
    Index(None, "policy", "is_listed", "group_id"),
    Index(None, "policy", "model", "is_listed", "group_id"),
)

# The pairs of listed completions alone, one row each: what a listing by metadata is read from.
stored_metadata = Table(
    "stored_metadata",
    metadata,
    Column("group_id", String(255), ForeignKey("groups.group_id"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("value", Text, nullable=False),
    Index(None, "policy", "key", "value", "group_id"),
)

feedback = Table(
    "feedback",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("feedback_id", String(255), nullable=False),
    Column("group_id", String(255), ForeignKey("groups.group_id"), nullable=False),
    Column("policy", String(64), nullable=False),
    Column("metric", String(64), nullable=False),
    Column("source", String(16), nullable=False),
    Column("rater_id", Text, nullable=False),
    Column("label", String(16)),
    # -1 stands for the group as a whole: NULLs never equal each other in a unique constraint.
    Column("choice_index", Integer, nullable=False),
    Column("value", JsonText),
    Column("text", Text),
    Column("shown_order", JSON, nullable=False),
    Column("latency_ms", BigInteger),
    Column("revision", Integer, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("feedback_id"),
    UniqueConstraint("group_id", "rater_id", "metric", "choice_index", "revision"),
    Index(None, "policy", "seq"),
    Index(None, "policy", "rater_id"),
    sqlite_autoincrement=True,
)

datasets = Table(
    "datasets",
    metadata,
    Column("dataset_id", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id")),
    Column("path", Text, nullable=False),
    Column("n_train", Integer, nullable=False),
    Column("n_heldout", Integer, nullable=False),
    Column("counts", JSON, nullable=False),
    Column("dropped", JSON, nullable=False),
    Column("feedback_seq", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "policy", "created_at"),
)

dataset_pairs = Table(
    "dataset_pairs",
    metadata,
    Column("dataset_id", String(64), ForeignKey("datasets.dataset_id"), primary_key=True),
    Column("pair_id", String(255), primary_key=True),
    Index(None, "pair_id"),
)

pair_groups = Table(
    "pair_groups",
    metadata,
    Column("pair_id", String(255), primary_key=True),
    Column("group_id", String(255), ForeignKey("groups.group_id"), primary_key=True),
    Index(None, "group_id"),
)

pair_feedback = Table(
    "pair_feedback",
    metadata,
    Column("pair_id", String(255), primary_key=True),
    Column("feedback_id", String(255), ForeignKey("feedback.feedback_id"), primary_key=True),
    Index(None, "feedback_id"),
)

versions = Table(
    "versions",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("path", Text, nullable=False),
    Column("artifact_hash", String(128), nullable=False),
    Column("parent", Integer),
    Column("dataset_id", String(64), ForeignKey("datasets.dataset_id")),
    Column("run_id", String(64), ForeignKey("runs.run_id")),
    Column("created_at", UtcDateTime, nullable=False),
    # Of versions that a fine-tuning job made, with recipe and result (record); step number and metrics of its checkpoints.
    # SQLite cannot add a foreign key.
    Column("job_id", String(64)),
    Column("step_number", Integer),
    Column("model_name", String(255)),
    Column("metrics", JSON),
    Column("record", JSON),
    ForeignKeyConstraint(["policy", "parent"], ["versions.policy", "versions.number"]),
    Index("uq_versions_model_name", "model_name", unique=True),
    Index(None, "job_id"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("alias", String(16), primary_key=True),
    Column("number", Integer, nullable=False),
    ForeignKeyConstraint(["policy", "number"], ["versions.policy", "versions.number"]),
)

promotions = Table(
    "promotions",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("previous", Integer),
    Column("action", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id")),
    Column("created_at", UtcDateTime, nullable=False),
    ForeignKeyConstraint(["policy", "number"], ["versions.policy", "versions.number"]),
    Index(None, "policy", "seq"),
    sqlite_autoincrement=True,
)

cycles = Table(
    "cycles",
    metadata,
    Column("cycle_id", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("parent", Integer, nullable=False),
    Column("trigger", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("policy", "number"),
)

cycle_steps = Table(
    "cycle_steps",
    metadata,
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("state", String(32), nullable=False),
    Column("record", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

duels = Table(
    "duels",
    metadata,
    Column("duel_id", String(64), primary_key=True),
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id"), nullable=False),
    Column("policy", String(64), nullable=False),
    Column("champion", Integer, nullable=False),
    Column("challenger", Integer, nullable=False),
    Column("opened_at", UtcDateTime, nullable=False),
    Column("closed_at", UtcDateTime),
    Column("kind", String(8), nullable=False, server_default="gate"),
    Index(None, "policy", "closed_at"),
    Index(None, "policy", "opened_at"),
)

verdicts = Table(
    "verdicts",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id"), nullable=False),
    Column("duel_id", String(64), ForeignKey("duels.duel_id")),
    Column("kind", String(16), nullable=False),
    Column("reasons", JSON, nullable=False),
    Column("e_value", Float(53), nullable=False),
    Column("wins", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("ties", Integer, nullable=False),
    Column("raters", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "cycle_id", "seq"),
    sqlite_autoincrement=True,
)

quarantines = Table(
    "quarantines",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("rater_id", Text, nullable=False),
    Column("action", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "policy", "seq"),
    sqlite_autoincrement=True,
)

# What the labelling queue shows to whom, until when; deleted a day after it ends.
reservations = Table(
    "reservations",
    metadata,
    Column("reservation_id", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("group_id", String(255), ForeignKey("groups.group_id"), nullable=False),
    Column("rater_id", Text, nullable=False),
    Column("kind", String(16), nullable=False),
    # Which answer stands in the first place.
    Column("first_index", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("done_at", UtcDateTime),
    Index(None, "group_id"),
    Index(None, "policy", "rater_id"),
    Index(None, "expires_at"),
)

# Comparisons whose answer is known; what was marked and taken back, and why, is in the audit trail.
gold_items = Table(
    "gold_items",
    metadata,
    Column("group_id", String(255), ForeignKey("groups.group_id"), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("label", String(16), nullable=False),
    Column("origin", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "policy", "created_at"),
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id")),
    Column("dataset_id", String(64), ForeignKey("datasets.dataset_id"), nullable=False),
    Column("parent", Integer, nullable=False),
    Column("status", String(32), nullable=False),
    Column("owner", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("lease_expires_at", UtcDateTime, nullable=False),
    Column("heartbeat_at", UtcDateTime, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("result", JSON, nullable=False),
    Column("error", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "policy", "created_at"),
    Index(None, "cycle_id", "attempt"),
)

files = Table(
    "files",
    metadata,
    Column("file_id", String(64), primary_key=True),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("path", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("status_details", Text),
    Column("created_at", UtcDateTime, nullable=False),
    # The row stays as what a job's lineage names; the content is gone.
    Column("deleted_at", UtcDateTime),
)

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("status", String(32), nullable=False),
    Column("model", Text, nullable=False),
    Column("policy", String(64), nullable=False),
    # Where the model is not this server's own: which base the lineage ``policy`` was begun on.
    Column("base_model", Text),
    Column("parent", Integer, nullable=False),
    Column("training_file", String(64), ForeignKey("files.file_id"), nullable=False),
    Column("validation_file", String(64), ForeignKey("files.file_id")),
    Column("method", JSON, nullable=False),
    Column("suffix", String(64)),
    Column("seed", BigInteger, nullable=False),
    Column("metadata", JSON),
    Column("paused", Boolean, nullable=False),
    Column("owner", Text),
    Column("lease_expires_at", UtcDateTime),
    Column("heartbeat_at", UtcDateTime),
    Column("attempt", Integer, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("dataset_id", String(64), ForeignKey("datasets.dataset_id")),
    Column("fine_tuned_model", String(255)),
    Column("trained_tokens", BigInteger),
    Column("result_files", JSON, nullable=False),
    Column("error", JSON),
    Column("created_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    Index(None, "status", "job_id"),
    Index(None, "dataset_id"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("event_id", String(64), nullable=False),
    Column("job_id", String(64), ForeignKey("jobs.job_id"), nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("event_id"),
    Index(None, "job_id", "seq"),
    sqlite_autoincrement=True,
)

events = Table(
    "events",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("event_id", String(64), nullable=False),
    Column("type", String(64), nullable=False),
    Column("policy", String(64), nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("event_id"),
    sqlite_autoincrement=True,
)

webhook_cursors = Table(
    "webhook_cursors",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("endpoint", String(64), primary_key=True),
    # What happened up to here is not told: it was before the endpoint was named.
    Column("begin_seq", BigInteger, nullable=False),
    Column("seen_seq", BigInteger, nullable=False),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("endpoint", String(64), primary_key=True),
    Column("event_id", String(64), ForeignKey("events.event_id"), primary_key=True),
    Column("status", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", UtcDateTime, nullable=False),
    Column("error", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Index(None, "status", "next_at"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("owner", Text),
    # Fencing token: rises with every change of owner and is never reused.
    Column("token", BigInteger, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
)

triggers = Table(
    "triggers",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("reason", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    # False where the clock or new pairs put it there.
    Column("is_asked", Boolean, nullable=False, server_default=true()),
)

# What operators set of the schedule: the newest row of a setting holds, and without is_set the file's value does.
# By whom, when and why is in the audit trail, and only there.
schedule_changes = Table(
    "schedule_changes",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("setting", String(32), nullable=False),
    Column("is_set", Boolean, nullable=False),
    Column("value", JSON, nullable=False),
    Column("audit_seq", _Sequence, ForeignKey("audit.seq"), nullable=False),
    Index(None, "policy", "setting", "seq"),
    sqlite_autoincrement=True,
)

keys = Table(
    "keys",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("secret_hash", String(64), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("requests_per_minute", Integer),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
)

# A removed account keeps its row, without its password: the audit trail names it.
accounts = Table(
    "accounts",
    metadata,
    Column("name", String(48), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("password_hash", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("last_login_at", UtcDateTime),
    Column("removed_at", UtcDateTime),
)

# Who is signed in, by a key or an account; the row goes when the session ends.
sessions = Table(
    "sessions",
    metadata,
    Column("session_id", String(64), primary_key=True),
    Column("secret_hash", String(64), nullable=False),
    Column("key_id", String(64), ForeignKey("keys.key_id")),
    Column("account", String(48), ForeignKey("accounts.name")),
    Column("address", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("used_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Index(None, "created_at", "session_id"),
)

# Who was erased, as a salted hash: a row can be matched by hashing its user, and nobody can be read out of it.
erasures = Table(
    "erasures",
    metadata,
    Column("erasure_id", String(64), primary_key=True),
    Column("salt", String(32), nullable=False),
    Column("subject_hash", String(64), nullable=False),
    Column("reason", Text, nullable=False),
    Column("counts", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

version_marks = Table(
    "version_marks",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("erasure_id", String(64), ForeignKey("erasures.erasure_id"), primary_key=True),
    Column("rows", Integer, nullable=False),
    ForeignKeyConstraint(["policy", "number"], ["versions.policy", "versions.number"]),
)

# What a version and the champion of then said to some prompts of its offline report. The prompt stands in its group; a row
# goes when that group's texts are erased.
samples = Table(
    "samples",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("group_id", String(255), ForeignKey("groups.group_id"), nullable=False),
    Column("against", Integer, nullable=False),
    Column("ours", Text, nullable=False),
    Column("theirs", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    ForeignKeyConstraint(["policy", "number"], ["versions.policy", "versions.number"]),
    Index(None, "group_id"),
)

# Artifact folders that were removed on purpose; of a dataset, the one that holds what is left of its rows.
removed_artifacts = Table(
    "removed_artifacts",
    metadata,
    Column("path", String(255), primary_key=True),
    Column("reason", String(32), nullable=False),
    Column("successor", String(64), ForeignKey("datasets.dataset_id")),
    Column("created_at", UtcDateTime, nullable=False),
    Column("cleared_at", UtcDateTime),  # when the folder's files were gone
)

# What was done to the loop, by whom and why.
audit = Table(
    "audit",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("details", JSON, nullable=False),
    Index(None, "action", "seq"),
    sqlite_autoincrement=True,
)

canaries = Table(
    "canaries",
    metadata,
    Column("canary_id", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("version", Integer, nullable=False),
    Column("champion", Integer, nullable=False),
    # Which users it answers: those whose hash with the salt is below the share.
    Column("share", Float(53), nullable=False),
    Column("salt", String(32), nullable=False),
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id")),
    Column("reason", Text, nullable=False),
    Column("opened_at", UtcDateTime, nullable=False),
    Column("closed_at", UtcDateTime),
    Column("outcome", String(16)),
    Column("outcome_reason", Text),
    ForeignKeyConstraint(["policy", "version"], ["versions.policy", "versions.number"]),
    Index(None, "policy", "closed_at"),
    Index(None, "policy", "opened_at"),
)

# What each process saw of each version's live answers, minute by minute; the row of a minute that is over does not change.
traffic = Table(
    "traffic",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("minute", UtcDateTime, primary_key=True),
    Column("process", String(128), primary_key=True),
    Column("answers", Integer, nullable=False),
    Column("errors", Integer, nullable=False),
    Column("refusals", Integer, nullable=False),
    Column("unseen", Integer),  # NULL before this was told apart
    # Counts by class of a logarithmic scale: milliseconds per token, and tokens per answer.
    Column("latency", JSON, nullable=False),
    Column("length", JSON, nullable=False),
    Index(None, "minute"),
)

stored_replies = Table(
    "stored_replies",
    metadata,
    Column("caller", String(64), primary_key=True),
    Column("idempotency_key", String(255), primary_key=True),
    Column("request_hash", String(64), nullable=False),
    # What the reply is about, by its id: a completion that is deleted takes the replies that hold its text with it.
    Column("subject", String(255)),
    Column("status", Integer, nullable=False),
    Column("headers", JSON, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "created_at"),
    Index(None, "subject"),
)

# Why a feedback row became part of no training row, as the last dataset that looked at it said.
set_aside = Table(
    "set_aside",
    metadata,
    Column("feedback_id", String(255), ForeignKey("feedback.feedback_id"), primary_key=True),
    Column("dataset_id", String(64), ForeignKey("datasets.dataset_id"), nullable=False),
    Column("reason", String(32), nullable=False),
)

# What an operator decided about single groups: not to train on them, to show them to raters again. The newest row holds.
marks = Table(
    "marks",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("group_id", String(255), ForeignKey("groups.group_id"), nullable=False),
    Column("mark", String(16), nullable=False),
    Column("is_set", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "group_id", "mark", "seq"),
    Index(None, "policy", "mark", "seq"),
    sqlite_autoincrement=True,
)

# Named sets of filters over the preferences.
saved_views = Table(
    "saved_views",
    metadata,
    Column("view_id", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("filters", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("policy", "name"),
)
