"""The files of the log-prob store: its lock, its deletions, their sizes. Nothing here needs torch.

Deletions are numbered (`.deleted/`, by a hash of the user): a run writes nothing of a user who was deleted after it
first opened the store. Every write and every deletion holds the store's lock (`store.lock`); both stay.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from perce_lite.console import say, warn
from perce_lite.files import disk_full_is_clear, earlier_name, hash_of, safe_name, write_text

SUFFIX = ".safetensors"


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds the lock of the store in `root`; who holds it now ends its write first."""
    file = root / "store.lock"
    with disk_full_is_clear(file):
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Deletions:
    """The deletions in a store, numbered from 1: in `.deleted/` a file a user, by hash, and one for all users.

    seen: the last deletion before this process opened the store; what was deleted later, it does not write
    """

    _known: ClassVar[dict[Path, "Deletions"]] = {}

    def __init__(self, folder: Path) -> None:
        self._folder, self._told = folder, False
        self.seen = self._number("count")

    @classmethod
    def of(cls, root: Path) -> "Deletions":
        """Those of the store in `root`, as they were when this process first asked."""
        folder = root.absolute() / ".deleted"
        return cls._known.setdefault(folder, cls(folder))

    def forbid(self, hashed: str) -> bool:
        """Whether the user of this hash was deleted since, which is said once. Hold the store's lock."""
        forbidden = max(self._number(hashed), self._number("all")) > self.seen
        if forbidden and not self._told:
            say("Users were deleted from the store since this run began: what it scores of them is not kept.")
            self._told = True
        return forbidden

    def add(self, name: str) -> None:
        """Numbers a deletion, of all users ("all") or of the user of this hash. Hold the store's lock.

        What this process scores from now on it may keep.
        """
        number = self._number("count") + 1
        write_text(self._folder / name, str(number))
        write_text(self._folder / "count", str(number))
        self.seen, self._told = number, False

    def _number(self, name: str) -> int:
        try:
            return int((self._folder / name).read_text())
        except FileNotFoundError:
            return 0


def usage(root: Path) -> list[dict[str, int | str]]:
    """Files, entries and bytes of each base in the store."""
    usages: list[dict[str, int | str]] = []
    for folder in _bases(root):
        files = sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name))
        entries = size = 0
        for file in files:
            try:
                size += file.stat().st_size
                with safe_open(file, framework="np") as tensors:
                    entries += len(list(tensors.keys()))
            except (SafetensorError, OSError):
                warn(f"{file} is broken")
        usages.append({"base": folder.name, "users": len(files), "entries": entries, "bytes": size})
    return usages


def clear(root: Path) -> int:
    """Removes every entry, also for runs that are on now, and the leftovers of killed ones; returns the bytes freed."""
    if not root.is_dir():
        return 0
    freed = 0
    with locked(root):
        Deletions.of(root).add("all")
        for folder in _bases(root):
            ours = [path for path in folder.iterdir() if any(kind.fullmatch(path.name) for kind in _OURS)]
            freed += sum(map(_unlink, ours))
            if not any(folder.iterdir()):
                folder.rmdir()
    return freed


def delete(root: Path, user: str, dry_run: bool = False) -> dict[Path, int]:
    """Removes all entries of `user`, also for runs that are on now; returns the bytes of each file that was there.

    dry_run: nothing is removed
    """
    if not root.is_dir():
        return {}
    removed: dict[Path, int] = {}
    with locked(root):
        if not dry_run:
            Deletions.of(root).add(hash_of(user))
        for folder in _bases(root):
            for name in (f"{safe_name(user)}{SUFFIX}", f"{earlier_name(user)}{SUFFIX}"):
                paths = [folder / name, folder / f"{name}.lock", *folder.glob(f".{name}.*.tmp")]
                there = [path for path in paths if path.exists()]
                removed |= {path: path.stat().st_size if dry_run else _unlink(path) for path in there}
    return removed


def _unlink(path: Path) -> int:
    """Removes a file; the bytes that it had."""
    size = path.stat().st_size
    path.unlink()
    return size


# Names of a store file, of the lock that it had in earlier versions, and of the temporary file of a killed write. The
# hash had 48 bits in earlier versions and has 96. Other files in the folders are not ours.
_FILE = re.compile(r"[a-z0-9-]+-[0-9a-f]{12}([0-9a-f]{12})?\.safetensors")
_OURS = (_FILE, re.compile(rf"{_FILE.pattern}\.lock"), re.compile(rf"\.{_FILE.pattern}\.\w+\.tmp"))


def _bases(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))
