"""Train: training rows and a parent become a new version, or the finding that there is nothing to train.

The training itself runs in a child process (`pairloop.learner`), so that a crash or too little memory never takes serving
down. `run_in` starts it in a folder, follows its metrics, and takes it up again where it was interrupted: the one way to train,
for whoever asks. `run` is the loop's stage (a run row, a version), `train_file` needs neither store nor server, a fine-tuning
job calls `run_in` itself. `recipe` says what a job's hyperparameters mean.
"""

from pairloop.loop.train.attempts import (
    MAX_ATTEMPTS,
    OnCheckpoint,
    OnProgress,
    ShouldStop,
    Start,
    figures_of,
    run_in,
)
from pairloop.loop.train.elsewhere import Shared, forget
from pairloop.loop.train.file import train_file
from pairloop.loop.train.recipe import train_settings, with_objective
from pairloop.loop.train.stage import TrainRecord, folder_of, metrics_of, run

__all__ = [
    "MAX_ATTEMPTS",
    "OnCheckpoint",
    "OnProgress",
    "Shared",
    "ShouldStop",
    "Start",
    "TrainRecord",
    "figures_of",
    "folder_of",
    "forget",
    "metrics_of",
    "run",
    "run_in",
    "train_file",
    "train_settings",
    "with_objective",
]
