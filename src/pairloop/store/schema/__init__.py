"""The tables, by topic; import them from here. Portable SQL only: what SQLite alone needs is in database.py.

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

from pairloop.store.schema.access import accounts, audit, keys, sessions, stored_replies
from pairloop.store.schema.base import metadata
from pairloop.store.schema.deployment import aliases, canaries, promotions, samples, traffic, versions
from pairloop.store.schema.fine_tuning import files, job_events, jobs
from pairloop.store.schema.loop import cycle_steps, cycles, duels, leases, schedule_changes, triggers, verdicts
from pairloop.store.schema.privacy import erasures, removed_artifacts, version_marks
from pairloop.store.schema.rating import feedback, gold_items, marks, quarantines, reservations, saved_views
from pairloop.store.schema.sampling import completions, groups, stored_completions, stored_metadata
from pairloop.store.schema.training import dataset_pairs, datasets, pair_feedback, pair_groups, runs, set_aside
from pairloop.store.schema.webhooks import events, webhook_cursors, webhook_deliveries

__all__ = [
    "accounts",
    "aliases",
    "audit",
    "canaries",
    "completions",
    "cycle_steps",
    "cycles",
    "dataset_pairs",
    "datasets",
    "duels",
    "erasures",
    "events",
    "feedback",
    "files",
    "gold_items",
    "groups",
    "job_events",
    "jobs",
    "keys",
    "leases",
    "marks",
    "metadata",
    "pair_feedback",
    "pair_groups",
    "promotions",
    "quarantines",
    "removed_artifacts",
    "reservations",
    "runs",
    "samples",
    "saved_views",
    "schedule_changes",
    "sessions",
    "set_aside",
    "stored_completions",
    "stored_metadata",
    "stored_replies",
    "traffic",
    "triggers",
    "verdicts",
    "version_marks",
    "versions",
    "webhook_cursors",
    "webhook_deliveries",
]
