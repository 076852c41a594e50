"""A contestant's process: ``python -m pairloop.bench.worker SPEC.json``; turns come in on stdin, figures go out on stdout."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from pairloop.bench.pacing import Pacer
from pairloop.errors import PairloopError

CONTESTANTS = {
    "pairloop_train": "pairloop.bench.ours:train",
    "pairloop_sample": "pairloop.bench.ours:sample",
    "trl": "pairloop.bench.trl:train",
    "generate": "pairloop.bench.generate:sample",
    "continuous": "pairloop.bench.generate:sample_continuously",
}


def main(path: str) -> int:
    # What libraries print belongs into the log, not between the figures.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    pacer = Pacer(sys.stdin, replies)
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    module, function = CONTESTANTS[spec["contestant"]].split(":")
    try:
        getattr(importlib.import_module(module), function)(spec, pacer)
    except PairloopError as error:
        pacer.fail(str(error))
        return 1
    except Exception as error:  # noqa: BLE001 - reported to the conductor, which ends the race
        traceback.print_exc()
        pacer.fail(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
