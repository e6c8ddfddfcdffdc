"""What a person sees: one console, one kind of progress bar, one way to warn."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

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


def progress_bar(refresh_per_second: float = 10) -> Progress:
    """A progress bar with count, time gone and time left, on standard error."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
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
