"""Log-probs kept between runs: `<base>/<slug-hash>.safetensors`, one file a user.

An entry's key is a hash of ids and labels; the folder's name is a hash of everything else that its value depends on
(`scoring.store_key`). So a changed value has another key, and a hit is never stale.
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perce_lite.console import warn
from perce_lite.files import disk_full_is_clear, hash_of, named, safe_name, written_aside
from perce_lite.model.store_files import SUFFIX, Deletions, locked


def entry_key(ids: Sequence[int], labels: Sequence[int], prefix: int = 0) -> str:
    """The key of a row's log-probs: ids (T,), labels (T,), and how many leading tokens run with the adapter off."""
    numbers = [*ids, *labels, *([prefix] if prefix else [])]
    packed = struct.pack(f"<I{len(numbers)}i", len(ids), *numbers)
    return hashlib.sha256(packed).hexdigest()[:32]


class Store:
    """Entries (R,) float32, nats, of one base. Safe with two processes and if a process is killed at any moment."""

    def __init__(self, root: Path, base: str) -> None:
        self.folder = root / base
        with disk_full_is_clear(root):
            root.mkdir(parents=True, exist_ok=True)  # so that who deletes finds a store, if nothing in it yet
        self._deletions = Deletions.of(root)

    def path(self, user: str) -> Path:
        """The file of `user`."""
        return named(self.folder, user, SUFFIX)

    def get(self, user: str) -> dict[str, Tensor]:
        """All entries of `user` by key; a broken file counts as empty, with a warning."""
        path = self.path(user)
        if not path.is_file():
            return {}
        try:
            with safe_open(path, framework="pt") as file:
                entries = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                expected = (file.metadata() or {}).get("digest")
        except FileNotFoundError:  # deleted since
            return {}
        except (SafetensorError, OSError) as error:
            warn(f"the store file {path} is broken ({error}); its rows are scored anew")
            return {}
        if expected != _digest(entries):
            warn(f"the store file {path} does not hold what was written; its rows are scored anew")
            return {}
        return entries

    def put(self, user: str, entries: Mapping[str, Tensor]) -> None:
        """Adds `entries` to those of `user`; nothing where the user was deleted since this process opened the store.

        Raises:
            DiskFullError: no space left; what was there stays.
        """
        with locked(self.folder.parent):
            if self._deletions.forbid(hash_of(user)):
                return
            merged = {**self.get(user), **{key: value.float().contiguous() for key, value in entries.items()}}
            before, path = self.path(user), self.folder / f"{safe_name(user)}{SUFFIX}"
            with written_aside(path) as aside:
                save_file(merged, aside, metadata={"digest": _digest(merged)})
            if before != path:  # an earlier version named it
                before.unlink()


def _digest(entries: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256()
    for key in sorted(entries):
        state.update(key.encode() + entries[key].to(torch.float32).numpy().tobytes())
    return state.hexdigest()
