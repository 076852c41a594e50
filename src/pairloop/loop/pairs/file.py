"""From a file of dataset rows to training rows: for a run on a file, and for a fine-tuning job."""

from __future__ import annotations

from pathlib import Path

from pairloop.config import Config
from pairloop.formats import ReadResult, read_rows
from pairloop.loop.pairs.rows import compile_rows, refuse_empty
from pairloop.loop.pairs.rules import CompiledRows, PairRules


def compile_file(
    path: Path,
    config: Config,
    objective: str,
    *,
    family: str | None = None,
    split_prompts: bool = False,
    skip_refused: bool = False,
    param: str = "training_file",
) -> tuple[ReadResult, CompiledRows]:
    """What ``path`` says, and the rows of it that ``objective`` learns from; ``split_prompts`` holds some prompts out.

    RowsError with every refused row, unless ``skip_refused``; InvalidRequestError for ``param`` where nothing is left to train
    on, which is what demonstrations are to an objective that compares answers.
    """
    read = read_rows(path, family=family, max_chars=config.pairs.max_chars)
    if not skip_refused:
        read.or_raise()
    compiled = compile_rows(read.groups, PairRules.of(config, split_prompts=split_prompts), objective)
    return read, refuse_empty(compiled, objective, param=param)
