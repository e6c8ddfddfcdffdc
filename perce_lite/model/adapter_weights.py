"""An adapter's numbers, written and read: a plain LoRA as peft has it, or a core alone, which names its parent.

Whoever reads an adapter's numbers reads them here: a core comes out as the plain LoRA that it makes of its parent. What
the files are stands in `adapter_files`.
"""

import functools
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from perce_lite.config import DTYPES
from perce_lite.errors import AdapterError
from perce_lite.files import METADATA, folder_written_aside, read_json
from perce_lite.model.adapter_files import (
    CONFIG,
    CORE,
    MEND_CORE,
    WEIGHTS,
    Storage,
    is_core,
    lora_options,
    parent_of,
)
from perce_lite.model.fingerprint import FileStamp, hash_tensor
from perce_lite.model.lora_core import Cored

_CHANGE = ".lora_core.change"
"""End of a core's name: what is stored is C less the identity, which loses nothing near 1 in bfloat16 either."""

_SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""Options of `LoraConfig` that say how strongly A and B count."""


# Writing


def write_core(aside: Path, folder: Path, cored: Cored, config: LoraConfig, storage: Storage) -> dict[str, Any]:
    """Writes a core into `aside`, which becomes `folder`, and its parent beside if it is new.

    Gives what the metadata say of it: the parent's path from `folder` on, and its fingerprint.
    """
    assert storage.parents is not None
    fingerprint = _parent_fingerprint(cored.parent, config.to_dict())
    parent = storage.parents / fingerprint
    if not _holds(parent, fingerprint):
        with folder_written_aside(parent, once=not parent.exists()) as new:  # workers of one fleet write side by side
            write_tensors(new / WEIGHTS, cored.parent, DTYPES[storage.dtype])
            config.save_pretrained(str(new))
    changes = {f"{path}{_CHANGE}": change(core) for path, core in cored.cores.items()}
    write_tensors(aside / CORE, changes, DTYPES[storage.dtype])
    return {"core": {"parent": os.path.relpath(parent, folder), "fingerprint": fingerprint}}


def _holds(parent: Path, fingerprint: str) -> bool:
    """Whether a parent lies there, and is what it was."""
    try:
        return _fingerprint_of(FileStamp.of(parent / WEIGHTS), FileStamp.of(parent / CONFIG)) == fingerprint
    except (OSError, AdapterError):
        return False


@functools.lru_cache(maxsize=64)
def _fingerprint_of(weights: FileStamp, config: FileStamp) -> str:
    return _parent_fingerprint(_load(weights.path), read_json(config.path) or {})


def write_tensors(file: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Writes `tensors` to `file`, as `dtype`."""
    plain = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    save_file(plain, file, metadata={"format": "pt"})


def change(core: Tensor) -> Tensor:
    """C less the identity, (r, r); exact where the diagonal is between 0.5 and 2."""
    return core - torch.eye(len(core), dtype=core.dtype, device=core.device)


def _parent_fingerprint(parent: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Hash of a parent's numbers, in float32 whatever they are stored as, and of its scale."""
    state = xxhash.xxh3_128()
    state.update(json.dumps({name: config.get(name) for name in _SCALE}, sort_keys=True).encode())
    for name, tensor in sorted(parent.items()):
        hash_tensor(state, name, tensor.to(torch.float32))
    return str(state.hexdigest())


# Reading


def tensors(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's names, float32 on the CPU; a core is folded into its parent.

    Raises:
        AdapterError: a file that is missing or damaged, or a parent that is not the one of the core's training.
    """
    if not is_core(folder):
        return _load(folder / WEIGHTS)
    parent = parent_of(folder)
    numbers = _load(parent / WEIGHTS)
    if _parent_fingerprint(numbers, lora_options(folder)) != parent.name:
        raise AdapterError(f"{folder}: a core, and what it stands in, {parent}, has changed since. {MEND_CORE}")
    cores = {name.removesuffix(_CHANGE): tensor for name, tensor in _load(folder / CORE).items()}
    return Cored(numbers, {path: core + torch.eye(len(core)) for path, core in cores.items()}).plain()


def copy_plain(folder: Path, to: Path) -> None:
    """Writes the files that peft has of the adapter in `folder` into `to`; a core becomes a plain LoRA.

    Raises:
        AdapterError: as `tensors`.
    """
    if is_core(folder):
        write_tensors(to / WEIGHTS, tensors(folder), torch.float32)
    else:
        shutil.copyfile(folder / WEIGHTS, to / WEIGHTS)
    shutil.copyfile((parent_of(folder) if is_core(folder) else folder) / CONFIG, to / CONFIG)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return {name: tensor.to(torch.float32) for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error


def drop_unused_parents(parents: Path, adapters: Iterable[Path]) -> None:
    """Removes those in `parents` that none of the cores among `adapters`, folders of their files, names."""
    there = [folder for folder in parents.iterdir() if folder.is_dir()] if parents.is_dir() else []
    if not there:
        return
    named = (read_json(folder / METADATA) for folder in adapters if is_core(folder))
    used = {metadata["core"]["fingerprint"] for metadata in named if metadata}
    for folder in there:
        if folder.name not in used:
            shutil.rmtree(folder)
