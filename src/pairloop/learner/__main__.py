"""The training process: ``python -m pairloop.learner JOB.json [--die-with-parent] [--worker]``.

Where the job wants several processes, this one becomes their launcher, which starts each with ``--worker``.

Exit code 0: succeeded, or nothing to train; 2: the input is at fault; 1: the machine is, or a launcher's worker failed. The
result file says which and why.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from pairloop.config import log_of_child
from pairloop.learner import TrainJob, train
from pairloop.learner.child import DIE_WITH_PARENT, WORKER, launcher, wait_for_parents_end
from pairloop.telemetry import logs


def main(arguments: list[str]) -> int:
    if not arguments or set(arguments[1:]) - {DIE_WITH_PARENT, WORKER}:
        print(__doc__, file=sys.stderr)
        return 2
    job = TrainJob.load(Path(arguments[0]))
    if WORKER not in arguments and (command := launcher(job.train, arguments)):
        os.execv(sys.executable, [sys.executable, *command])
    if DIE_WITH_PARENT in arguments:
        threading.Thread(target=_die_with_parent, daemon=True).start()
    logs.setup(log_of_child())
    with logs.about(run=job.run_id):
        if WORKER not in arguments:
            return train(job).exit_code
        from pairloop.learner.supervise import work

        return work(job).exit_code


def _die_with_parent() -> None:
    wait_for_parents_end()
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
