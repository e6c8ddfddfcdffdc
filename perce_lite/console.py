"""What a person sees: one console, one kind of progress bar, one way to warn."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

console = Console(highlight=False)
"""Tables and text for people."""

errors = Console(stderr=True, highlight=False)
"""Progress, warnings and errors: standard output stays clean for what was asked for."""


PIR_BOUNDS = (-4.0, -2.0, -1.0, -0.4, -0.1, 0.1, 0.4, 1.0, 2.0, 4.0)
"""Nats between the 11 colours of a page's diverging map of PIR; the middle one is no colour."""

_silent = ContextVar("silent", default=False)


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside, progress bars and lines of `say` stay off the screen: one bar above them tells of all."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


_WIDE = 110
"""Columns of a terminal from which a bar has its full width."""

_OF_NUMBERS = 38
"""Columns that spinner, count and times take; what is left is for the bar, the description and the note."""

_NOTE = 32

_LINE_SECONDS, _LINE_SHARE, _LEAST_SECONDS = 30.0, 0.05, 2.0
"""Without a terminal a line comes after so long, or after such a share of the work, but never sooner than the last."""


class ProgressLines(Progress):
    """Progress as plain lines, for logs: no terminal, so nothing to draw over. Each says count, times and note."""

    def __init__(self, stream: Console, silent: bool) -> None:
        super().__init__(console=stream, disable=True)
        self._silent = silent
        self._said: dict[TaskID, tuple[float, float, str]] = {}

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def stop(self) -> None:
        for task_id in self.task_ids:
            self._say(task_id, last=True)

    def _say(self, task_id: TaskID, last: bool = False) -> None:
        """Writes the line of a task where it is due."""
        if self._silent:
            return
        task, now = self._tasks[task_id], self.get_time()
        start = now if task.start_time is None else task.start_time
        since, share, text = self._said.setdefault(task_id, (start, 0.0, ""))
        done = task.completed / task.total if task.total else 0.0
        waited = now - since
        due = waited >= _LINE_SECONDS or (done - share >= _LINE_SHARE and waited >= _LEAST_SECONDS)
        if (due or last) and (line := self._line(task, done)) != text:
            self._said[task_id] = now, done, line
            self.console.print(line, markup=False, soft_wrap=True)

    @staticmethod
    def _line(task: Task, done: float) -> str:
        total = "" if task.total is None else f" of {task.total:g} ({done:.0%})"
        left = task.time_remaining
        times = f"{_clock(task.elapsed or 0.0)}" + ("" if left is None or task.finished else f", {_clock(left)} left")
        note = task.fields.get("note") or ""
        return f"{task.description}: {task.completed:g}{total}, {times}{f'; {note}' if note else ''}"


def _clock(seconds: float) -> str:
    """0:04:12."""
    return str(timedelta(seconds=int(seconds)))


def progress_bar(refresh_per_second: float = 10) -> Progress:
    """A progress bar with count, time gone and time left, on standard error; lines where that is no terminal.

    Numbers are always whole: where columns are few, the description and the note are cut.
    """
    if not errors.is_terminal:
        return ProgressLines(errors, _silent.get())
    bar = 24 if errors.width >= _WIDE else 8
    room = max(12, errors.width - _OF_NUMBERS - bar)
    note = min(_NOTE, room // 2)

    def text(field: str, width: int) -> TextColumn:
        return TextColumn(field, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", max_width=width))

    return Progress(
        SpinnerColumn(),
        text("{task.description}", room - note),
        BarColumn(bar_width=bar),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        text("{task.fields[note]}", note),
        console=errors,
        disable=_silent.get(),
        refresh_per_second=refresh_per_second,
    )


def say(message: str) -> None:
    """One dim line about what is going on, on standard error."""
    if not _silent.get():
        errors.print(message, style="dim", markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """One line about something that went another way than asked, on standard error."""
    errors.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


def quiet() -> None:
    """Keeps other libraries' logs and bars off the screen; call it before they are imported. Errors still show."""
    warnings.filterwarnings("ignore", append=True)  # after what -W or a test asks for
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("bitsandbytes", "trl", "peft", "accelerate", "torch", "bm25s", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
