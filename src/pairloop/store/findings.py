"""What the doctor can find: each code, what it means, what ``--repair`` does about it, and what is left to a person."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """``repair``: None where only a person can mend it."""

    meaning: str
    repair: str | None
    by_hand: str


_FROM_BACKUP = "`restore` the newest backup"
_ACCEPT = "`--accept-loss` where no backup has it: it is recorded as lost, and no longer told"

FINDINGS = {
    "damaged_database": Finding("SQLite's own check of the file fails", None, f"stop the server and {_FROM_BACKUP}"),
    "orphan": Finding("a row names a row that is gone", None, f"evidence is gone: {_FROM_BACKUP}"),
    "pair_without_feedback": Finding(
        "a dataset's pair traces to no feedback", "its lineage is read from the dataset's own file", _FROM_BACKUP
    ),
    "pair_without_group": Finding(
        "a dataset's pair traces to no group", "its lineage is read from the dataset's own file", _FROM_BACKUP
    ),
    "dataset_without_pairs": Finding(
        "the store knows none of a dataset's pairs", "they are read from the dataset's own file", _FROM_BACKUP
    ),
    "dangling_alias": Finding(
        "an alias names a version that does not exist",
        "champion: the last promoted version that is whole, recorded as a rollback; challenger and canary: cleared",
        "`pairloop promote N --reason …`",
    ),
    "unusable_alias": Finding(
        "an alias names a version whose artifact is missing, broken or removed",
        "as `dangling_alias`, where the artifact does not come back from `--from BACKUP`",
        "`pairloop promote N --reason …`",
    ),
    "no_champion": Finding(
        "a policy has versions and no champion",
        "the last promoted version that is whole, recorded as a rollback",
        "`pairloop promote N --reason …`",
    ),
    "open_duel": Finding("a duel is open, and its cycle has ended", "the duel is closed", "nothing"),
    "version_without_job": Finding(
        "a version names a fine-tuning job that is gone", None, f"the version serves; {_FROM_BACKUP}"
    ),
    "job_without_model": Finding(
        "a job ended with a model that no version is called", None, f"run the job again, or {_FROM_BACKUP}"
    ),
    "unusable_setting": Finding(
        "what was set of a schedule is none that this version takes; the file's value holds",
        None,
        "`pairloop schedule set` it anew, or `pairloop schedule reset` it",
    ),
    "missing_file": Finding(
        "an uploaded file's content is gone",
        "it comes back from `--from BACKUP`; else the file is marked as deleted, where no open job needs it",
        "cancel the job that needs it, or upload it again",
    ),
    "broken_file": Finding(
        "an uploaded file is not what was uploaded", "as `missing_file`", "cancel the job that needs it, or upload it again"
    ),
    "missing_artifact": Finding(
        "the folder of a version or dataset is gone", "it comes back from `--from BACKUP`, where its hash matches", _ACCEPT
    ),
    "broken_artifact": Finding(
        "files of a version or dataset are not what was published",
        "it comes back from `--from BACKUP`, where its hash matches",
        _ACCEPT,
    ),
    "unfinished_upload": Finding(
        "a writer that is gone left an artifact without a manifest at the URL", "it is removed", "nothing"
    ),
    "orphan_checkpoint": Finding(
        "a checkpoint at the URL belongs to no run or job that goes on: its worker died between the end and the cleaning",
        "it is removed",
        "nothing",
    ),
    "unfinished_restore": Finding(
        "a restore that was killed left its copy of the database, with people's words, beside it, or in the state directory",
        "it is removed",
        "restore again, if that is still wanted",
    ),
    "stale_folder": Finding("a writer that is gone left a temporary folder", "it is removed", "nothing"),
    "unreferenced_artifact": Finding(
        "an artifact or upload that no row names, older than a day: its writer died before the row, or who deleted it",
        "it is moved to `tmp/` beside the artifacts, where it is removed a day later",
        "nothing",
    ),
}
