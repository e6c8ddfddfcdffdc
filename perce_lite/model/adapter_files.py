"""An adapter's files: a plain LoRA as peft has it, or a core alone, with the name of the parent that it stands in.

    adapter/                 a plain LoRA
      adapter_model.safetensors, adapter_config.json, perce_lite.json, README.md
    adapter/                 a core: r x r numbers a layer
      core.safetensors, perce_lite.json (its `core` names the parent), README.md
    parents/HASH/            a parent as it was when the core was trained; it stays as long as a core names it
      adapter_model.safetensors, adapter_config.json

Whoever reads an adapter's numbers reads them here: a core comes out as the plain LoRA that it makes of its parent.
"""

import functools
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from perce_lite.errors import AdapterError
from perce_lite.files import METADATA, folder_written_aside, read_json, write_json
from perce_lite.model.fingerprint import FileStamp, hash_tensor
from perce_lite.model.lora_core import Cored

WEIGHTS, CONFIG, CORE = "adapter_model.safetensors", "adapter_config.json", "core.safetensors"

_CHANGE = ".lora_core.change"
"""End of a core's name: what is stored is C less the identity, which loses nothing near 1 in bfloat16 either."""

_SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""Options of `LoraConfig` that say how strongly A and B count."""


@dataclass(frozen=True)
class Storage:
    """How adapters are stored.

    dtype: of their numbers on disk
    parents: folder for what cores stand in; None: a core is stored as the plain LoRA that it makes
    """

    dtype: torch.dtype = torch.float32
    parents: Path | None = None


PLAIN = Storage()


def holds_adapter(folder: Path) -> bool:
    """Whether an adapter's numbers are in `folder`, a core's included."""
    return (folder / WEIGHTS).is_file() or is_core(folder)


def is_core(folder: Path) -> bool:
    return (folder / CORE).is_file()


# Writing


def write_core(aside: Path, folder: Path, cored: Cored, config: LoraConfig, storage: Storage) -> dict[str, Any]:
    """Writes a core into `aside`, which becomes `folder`, and its parent beside if it is new.

    Gives what the metadata say of it: the parent's path from `folder` on, and its fingerprint.
    """
    assert storage.parents is not None
    fingerprint = _parent_fingerprint(cored.parent, config.to_dict())
    parent = storage.parents / fingerprint
    if not (parent / CONFIG).is_file():
        with folder_written_aside(parent) as new:
            write_tensors(new / WEIGHTS, cored.parent, storage.dtype)
            config.save_pretrained(str(new))
    changes = {f"{path}{_CHANGE}": change(core) for path, core in cored.cores.items()}
    write_tensors(aside / CORE, changes, storage.dtype)
    return {"core": {"parent": os.path.relpath(parent, folder), "fingerprint": fingerprint}}


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
        raise AdapterError(f"{folder}: a core, and what it stands in, {parent}, has changed since. {_MEND}")
    cores = {name.removesuffix(_CHANGE): tensor for name, tensor in _load(folder / CORE).items()}
    return Cored(numbers, {path: core + torch.eye(len(core)) for path, core in cores.items()}).plain()


def parent_of(folder: Path) -> Path:
    """The folder of what the core in `folder` stands in.

    Raises:
        AdapterError: it is not there, or the core does not name it.
    """
    named = (read_json(folder / METADATA) or {}).get("core")
    if not isinstance(named, dict) or not {"parent", "fingerprint"} <= set(named):
        raise AdapterError(f"{folder}: a core whose {METADATA} does not name what it stands in. {_MEND}")
    parent = (folder / named["parent"]).resolve()
    if parent.name != named["fingerprint"] or not (parent / WEIGHTS).is_file() or not (parent / CONFIG).is_file():
        raise AdapterError(f"{folder}: a core, and what it stands in, {parent}, is missing. {_MEND}")
    return parent


_MEND = (
    "A core is of use only inside its fleet's folder (perce-lite export --to peft makes a plain LoRA of it). Put back "
    "what was moved, or train the user anew with perce-lite fleet RECIPE --retrain USER."
)


def lora_options(folder: Path) -> dict[str, Any]:
    """The adapter's `LoraConfig` as peft saved it; of a core that of its parent.

    Raises:
        AdapterError: it is missing or cannot be read; a core's parent is missing.
    """
    file = (parent_of(folder) if is_core(folder) else folder) / CONFIG
    options = read_json(file)
    if not isinstance(options, dict):
        raise AdapterError(f"{folder}: its {CONFIG} cannot be read")
    return options


def copy_plain(folder: Path, to: Path) -> None:
    """Writes the adapter in `folder` to `to` as peft has it, with its metadata; a core becomes a plain LoRA.

    Raises:
        AdapterError: as `tensors`.
    """
    if not is_core(folder):
        for name in (WEIGHTS, CONFIG, METADATA):
            shutil.copyfile(folder / name, to / name)
        return
    write_tensors(to / WEIGHTS, tensors(folder), torch.float32)
    shutil.copyfile(parent_of(folder) / CONFIG, to / CONFIG)
    metadata = read_json(folder / METADATA)
    metadata.pop("core")
    write_json(to / METADATA, metadata)


def memory_bytes(folder: Path) -> int:
    """Bytes that the adapter in `folder` takes in memory, float32, a core as the plain LoRA that it becomes.

    Raises:
        AdapterError: as `parent_of`.
    """
    return _memory_bytes(FileStamp.of((parent_of(folder) if is_core(folder) else folder) / WEIGHTS))


@functools.lru_cache(maxsize=4096)
def _memory_bytes(stamp: FileStamp) -> int:
    with _opened(stamp.path) as file:
        return 4 * sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)


def fault(folder: Path) -> str | None:
    """What is wrong with the files of the adapter in `folder`; the numbers of plain ones are not read."""
    try:
        if is_core(folder):
            tensors(folder)
        else:
            with _opened(folder / WEIGHTS) as file:
                return None if list(file.keys()) else f"{folder} holds no weights"
    except AdapterError as error:
        return str(error)
    return None


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return {name: tensor.to(torch.float32) for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
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
