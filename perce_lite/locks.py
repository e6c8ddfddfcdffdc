"""Locks between processes. A lock file stays where it is: one that is unlinked can be held by two at once."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from perce_lite.errors import PerceLiteError
from perce_lite.files import digest, home, is_special, read_json, settle, write_json, write_text


@contextmanager
def held_alone(path: Path, refuse: Callable[[str], PerceLiteError]) -> Iterator[None]:
    """Holds the lock file `path` for the block; who holds it is written beside it, for the next who asks.

    refuse: makes the error for who comes second, from "process 12 on HOST, since TIME"

    Raises:
        what `refuse` makes: another process, or another thread, holds it. Nothing was waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(path, timeout=0), path.with_name(f"{path.name}.holder")
    try:
        lock.acquire()
    except Timeout as error:
        raise refuse(_who(holder)) from error
    try:
        settle(holder)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": now})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """For the block, no other process writes the file `path` in such a block; what a killed one left beside it is gone.

    The lock lies in the cache folder, so that none is left where people look for what they asked for.
    """
    if is_special(path):  # a pipe or a terminal: nothing is left beside it
        yield
        return
    file = path.resolve()
    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{digest(str(file))}.lock"):
        settle(file)
        yield


def write_alone(path: Path, text: str) -> None:
    """Writes `text` to `path` as the only writer, whole or not at all; what a killed one left beside it is gone."""
    with one_writer(path):
        write_text(path, text)


def _who(holder: Path) -> str:
    """Who holds a lock, as far as that is written; not who held it before and was killed."""
    known = read_json(holder)
    if not isinstance(known, dict) or not {"pid", "host", "since"} <= set(known):
        return "another process"
    if known["host"] == socket.gethostname() and not psutil.pid_exists(known["pid"]):
        return "another process"
    return f"process {known['pid']} on {known['host']}, since {known['since']}"
