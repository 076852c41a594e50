"""Fine-tuning jobs: a file of rows becomes a model of one's own, by the same training as a cycle's.

A job is created (``control``), its files are validated into a dataset (``validate``), it is trained (``work``), and leaves
a version that is known by its ``ft:`` name. ``queue`` moves jobs in two threads; whatever happens to
their process, another one goes on.
"""

from pairloop.loop.jobs.control import cancel, create, get, pause, resume
from pairloop.loop.jobs.models import ORGANIZATION, checkpoint_id, checkpoint_name, model_name
from pairloop.loop.jobs.queue import JobQueue
from pairloop.loop.jobs.request import JobRequest
from pairloop.loop.jobs.start import find_start
from pairloop.loop.jobs.uploads import TooLarge, upload
from pairloop.loop.jobs.uploads import delete as delete_file
from pairloop.loop.jobs.uploads import get as get_file
from pairloop.loop.jobs.validate import validate_next
from pairloop.loop.jobs.watching import (
    Figures,
    TrainingRun,
    figures,
    find,
    log_of,
    of_cycles,
    of_jobs,
    recipe_of,
    rows_trained_on,
)
from pairloop.loop.jobs.work import train_next

__all__ = [
    "ORGANIZATION",
    "Figures",
    "JobQueue",
    "JobRequest",
    "TooLarge",
    "TrainingRun",
    "cancel",
    "checkpoint_id",
    "checkpoint_name",
    "create",
    "delete_file",
    "figures",
    "find",
    "find_start",
    "get",
    "get_file",
    "log_of",
    "model_name",
    "of_cycles",
    "of_jobs",
    "pause",
    "recipe_of",
    "resume",
    "rows_trained_on",
    "train_next",
    "upload",
    "validate_next",
]
