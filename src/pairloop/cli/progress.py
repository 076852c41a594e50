"""The terminal's watcher: one line per stage and a live bar, on stderr, so that stdout stays one document."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class TerminalWatcher:
    """Prints stages as they end and keeps one bar for the phase that runs."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        is_file = not console.is_terminal  # which would get an empty line for the bar
        self._progress = Progress(*columns, console=console, transient=True, disable=is_file)
        self._task: TaskID | None = None
        self._text = ""

    def __enter__(self) -> TerminalWatcher:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        self._clear()
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def bar(self, text: str, done: int, of: int) -> None:
        if self._task is None or text != self._text:
            self._clear()
            self._task, self._text = self._progress.add_task(text, total=of), text
        self._progress.update(self._task, completed=done, total=of)

    def _clear(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
