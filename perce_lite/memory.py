"""The host's memory: what a process may still take of it, and giving back what it no longer needs."""

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_memory(cgroups: Path = _CGROUPS, own: Path = _OWN) -> int:
    """Bytes that the system has available, or fewer where a control group (version 1 or 2) around this process says so.

    cgroups: where control groups are mounted; own: the file that names those of this process
    """
    around = [place for group in _groups(cgroups, own) for place in (group, *group.parents)]
    left = [_room(place) for place in dict.fromkeys(around) if place.is_relative_to(cgroups)]
    return min([psutil.virtual_memory().available, *(room for room in left if room is not None)])


def _groups(cgroups: Path, own: Path) -> list[Path]:
    """The folders of the control groups of this process that limit memory; a container may see its own as the root."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        groups += [root / path.lstrip("/"), root]
    return groups


def _room(group: Path) -> int | None:
    """Bytes left in one control group, what could be given back of the file cache among them; None: it has no limit."""
    for limit, usage, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines()).get(inactive, "0")
        except (OSError, ValueError):
            continue
        return None if most == "max" else max(0, int(most) - used + int(cached))
    return None


def return_free_memory() -> None:
    """Returns to the system what was freed. glibc keeps it for later, in pieces: two gigabytes after a training."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def modules_frozen() -> Iterator[None]:
    """Inside, garbage collections look at new objects alone: not at modules, which take half a second each time.

    For many trainings one after another, each of which collects several times. What was there before is collected again
    afterwards; where a caller has frozen objects (`gc.freeze`), nothing is changed.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
