"""Log-probs kept between runs: `<base>/<slug-hash>.safetensors`, one file a user.

An entry's key is a hash of ids and labels; the folder's name is a hash of everything else that its value depends on
(`scoring.store_key`). So a changed value has another key, and a hit is never stale. Deleting a user is an unlink.
"""

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perce_lite.console import warn
from perce_lite.files import disk_full_is_clear, safe_name, written_aside


def entry_key(ids: Sequence[int], labels: Sequence[int], prefix: int = 0) -> str:
    """The key of a row's log-probs: ids (T,), labels (T,), and how many leading tokens run with the adapter off."""
    numbers = [*ids, *labels, *([prefix] if prefix else [])]
    packed = struct.pack(f"<I{len(numbers)}i", len(ids), *numbers)
    return hashlib.sha256(packed).hexdigest()[:32]


class Store:
    """Entries (R,) float32, nats, of one base. Safe with two processes and if a process is killed at any moment."""

    def __init__(self, root: Path, base: str) -> None:
        self.folder = root / base

    def path(self, user: str) -> Path:
        """The file of `user`."""
        return self.folder / f"{safe_name(user)}.safetensors"

    def get(self, user: str) -> dict[str, Tensor]:
        """All entries of `user` by key; a broken file counts as empty, with a warning."""
        path = self.path(user)
        if not path.is_file():
            return {}
        try:
            with safe_open(path, framework="pt") as file:
                entries = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                expected = (file.metadata() or {}).get("digest")
        except (SafetensorError, OSError) as error:
            warn(f"the store file {path} is broken ({error}); its rows are scored anew")
            return {}
        if expected != _digest(entries):
            warn(f"the store file {path} does not hold what was written; its rows are scored anew")
            return {}
        return entries

    def put(self, user: str, entries: Mapping[str, Tensor]) -> None:
        """Adds `entries` to those of `user`.

        Raises:
            DiskFullError: no space left; what was there stays.
        """
        path = self.path(user)
        with disk_full_is_clear(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with disk_full_is_clear(path), FileLock(f"{path}.lock"):
            merged = {**self.get(user), **{key: value.float().contiguous() for key, value in entries.items()}}
            with written_aside(path) as aside:
                save_file(merged, aside, metadata={"digest": _digest(merged)})


def usage(root: Path) -> list[dict[str, int | str]]:
    """Files, entries and bytes of each base in the store."""
    usages: list[dict[str, int | str]] = []
    for folder in _bases(root):
        files = sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name))
        entries = 0
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    entries += len(list(tensors.keys()))
            except (SafetensorError, OSError):
                warn(f"{file} is broken")
        size = sum(file.stat().st_size for file in files)
        usages.append({"base": folder.name, "users": len(files), "entries": entries, "bytes": size})
    return usages


def clear(root: Path) -> int:
    """Removes every entry and the leftovers of killed runs, no other file; returns the bytes freed."""
    freed = 0
    for folder in _bases(root):
        users = {
            path.name.lstrip(".").partition(".safetensors")[0]
            for path in folder.iterdir()
            if _LEFT.fullmatch(path.name)
        }
        for user in users:
            lock = folder / f"{user}.safetensors.lock"
            with FileLock(lock):  # a run that is writing finishes first
                for file in [*folder.glob(f"{user}.safetensors"), *folder.glob(f".{user}.safetensors.*.tmp")]:
                    freed += file.stat().st_size
                    file.unlink()
            lock.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    return freed


# Names of a store file, its lock and the temporary file of a killed write; other files in the folders are not ours.
_FILE = re.compile(r"[a-z0-9-]+-[0-9a-f]{12}\.safetensors")
_LEFT = re.compile(r"[a-z0-9-]+-[0-9a-f]{12}\.safetensors(\.lock)?|\.[a-z0-9-]+-[0-9a-f]{12}\.safetensors\.\w+\.tmp")


def _bases(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*") if path.is_dir())


def _digest(entries: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256()
    for key in sorted(entries):
        state.update(key.encode() + entries[key].to(torch.float32).numpy().tobytes())
    return state.hexdigest()
