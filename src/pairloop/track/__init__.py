"""Reports training runs and cycles to MLflow, Weights & Biases and TensorBoard, where the configuration names them.

A tracker is told, and never asked: it runs in a thread of its own, and what goes wrong there is logged once and ends its part
in that run, never the training. ``run`` says what is told, ``courier`` how, and one small file per tracker to whom.
"""

from pairloop.track.courier import Report, reporting
from pairloop.track.run import RunInfo, Tracker, training_info

__all__ = ["Report", "RunInfo", "Tracker", "reporting", "training_info"]
