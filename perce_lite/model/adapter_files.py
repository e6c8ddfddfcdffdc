"""The folder of an adapter as files: its metadata, and whether it is whole. Nothing here imports torch.

    adapter/                 a plain LoRA
      adapter_model.safetensors, adapter_config.json, perce_lite.json, README.md
    adapter/                 a core: r x r numbers a layer
      core.safetensors, perce_lite.json (its `core` names the parent), README.md
    parents/HASH/            a parent as it was when the core was trained; it stays as long as a core names it
      adapter_model.safetensors, adapter_config.json

`adapter_weights` reads and writes the numbers.
"""

import functools
import importlib.metadata
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from perce_lite.errors import AdapterError
from perce_lite.files import METADATA, read_json
from perce_lite.recipe import Recipe

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CORE = "core.safetensors"

FOREIGN = "foreign"
"""Key of the metadata of an adapter that another trainer made."""


@dataclass(frozen=True)
class Said:
    """What the caller says of an adapter, where its own files do not, or no longer.

    model: its base, a folder or a Hub id; data: a file of rows or documents, for the texts of its users
    template: for an adapter of another trainer, a chat template (.jinja, .j2), or how profile and query become messages
        (.yaml: the keys of a recipe's `template:`)
    """

    model: str | None = None
    data: Path | None = None
    template: Path | None = None


@dataclass(frozen=True)
class Storage:
    """How adapters are stored.

    dtype: of their numbers on disk, "float32" or "bfloat16"
    parents: folder for what cores stand in; None: a core is stored as the plain LoRA that it makes
    """

    dtype: str = "float32"
    parents: Path | None = None


PLAIN = Storage()


def read_metadata(folder: Path, said: Said | None = None) -> dict[str, Any]:
    """The metadata of the adapter in `folder` or in `folder/adapter`, with `folder`, the folder of its files, added.

    An adapter of another trainer (a LoRA of peft's without our metadata) has those that its base and `said` give.

    Raises:
        AdapterError: the folder is not there, holds no adapter, one of an incompatible version, or files that are empty
            or cut off.
        TemplateError: an adapter of another trainer, and no chat template anywhere.
    """
    said = said or Said()
    if not folder.is_dir():
        raise AdapterError(
            f"{folder}: there is no such folder. An adapter lies in <output_dir>/adapter after training."
        )
    for nested in (folder, folder / "adapter"):
        if not (nested / WEIGHTS).is_file() and not is_core(nested):
            continue
        metadata = read_json(nested / METADATA)
        if isinstance(metadata, dict):
            if said.template is not None and FOREIGN not in metadata:
                raise AdapterError(f"{folder}: --template is for adapters of other trainers; this one has its own")
            _check(metadata, nested)
            require_whole(nested)
            if not (said.model or metadata["recipe"]["model"]):
                raise AdapterError(f"{folder}: its {METADATA} names no base: give --model FOLDER")
            resolved = _with_base_found(metadata, nested)
            return {**resolved, "recipe": _as_said(resolved["recipe"], said), "folder": str(nested)}
        if (nested / CONFIG).is_file() and not (nested / METADATA).exists():
            require_whole(nested)
            from perce_lite.model.foreign import foreign_metadata  # reads the base's configuration, so loads torch

            return foreign_metadata(nested, read_json(nested / CONFIG), said.model, said.data, said.template)
    for nested in (folder, folder / "adapter"):
        if (nested / METADATA).is_file():
            whole = (nested / WEIGHTS).is_file() or is_core(nested)
            lacks = f"{METADATA} is empty or cut off" if whole else f"{WEIGHTS} is missing"
            raise AdapterError(f"{nested}: its {lacks}. {_ANEW}")
    raise AdapterError(
        f"{folder}: no adapter of PerCE Lite, nor another trainer's: it needs {WEIGHTS} and {CONFIG}. "
        "Give the folder that `perce-lite train` named at its end, or that a trainer saved."
    )


def _as_said(recipe: dict[str, Any], said: Said) -> dict[str, Any]:
    """An adapter's recipe with another model or other data."""
    data = recipe["data"] if said.data is None else {**recipe["data"], "path": str(said.data.absolute()), "hub": None}
    return {**recipe, "model": said.model or recipe["model"], "data": data}


def given_away(metadata: dict[str, Any]) -> dict[str, Any]:
    """`metadata` as an export has them: without paths of this machine, names of users and tokens of the Hub.

    A base that is a folder is called by the folder's name; what is exported of a core is a plain LoRA.
    """
    recipe = metadata["recipe"]
    public = {name: value if name == "template" else _without_paths(value) for name, value in recipe.items()}
    public["model"] = base_name(recipe["model"])
    public["data"] = {name: value for name, value in public["data"].items() if name not in ("path", "users")}
    return {**{name: value for name, value in metadata.items() if name not in ("folder", "core")}, "recipe": public}


def base_name(model: str) -> str:
    """What a base is called to others: a built-in name or a Hub id as it is, a folder by its last part."""
    return Path(model).name if Path(model).is_absolute() else model


def _without_paths(value: Any) -> Any:
    """`value` without what is an absolute path in it, or a token of the Hub."""
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items() if not _is_private(name, inner)}
    return (
        [_without_paths(inner) for inner in value if not _is_private("", inner)] if isinstance(value, list) else value
    )


def _is_private(name: str, value: Any) -> bool:
    return name == "hub_token" or (isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()))


def _with_base_found(metadata: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`metadata` with the folder of a base that `given_away` left the name of: peft's own config says where it was."""
    model, config = metadata["recipe"]["model"], read_json(folder / CONFIG)
    place = Path((config.get("base_model_name_or_path") or "") if isinstance(config, dict) else "")
    if not place.is_absolute() or place.name != model or not place.is_dir():
        return metadata
    return {**metadata, "recipe": {**metadata["recipe"], "model": str(place)}}


def require_profile_pass(folder: Path, recipe: Recipe) -> None:
    """Raises AdapterError if the adapter in `folder` was not trained with the `profile_pass` of `recipe`."""
    trained, asked = Recipe.model_validate(read_metadata(folder)["recipe"]).profile_pass, recipe.profile_pass
    if trained != asked:
        raise AdapterError(
            f"{folder}: this adapter was trained with profile_pass: {trained} and would be used with {asked}, which is "
            f"not what it learned. Add --set train.profile_pass={trained}."
        )


def _check(metadata: dict[str, Any], folder: Path) -> None:
    """Raises AdapterError if `metadata` lack what this version needs."""
    unfit = [key for key in ("recipe", "base", "train_on", "chat_template", "run") if key not in metadata]
    try:
        if not unfit:
            Recipe.model_validate(metadata["recipe"])
            return
    except ValidationError as error:
        unfit = [".".join(map(str, fault["loc"])) for fault in error.errors()]
    writer, here = metadata.get("versions", {}).get("perce-lite", "unknown"), importlib.metadata.version("perce-lite")
    version = "an earlier state of this version" if writer == here else f"another version, {writer}; this is {here}"
    raise AdapterError(
        f"{folder}: its {METADATA} was written by PerCE Lite in {version}. It does not fit in: {', '.join(unfit)}. "
        "Train it anew, install what wrote it, or load the folder with peft."
    )


def require_whole(folder: Path) -> None:
    """Raises AdapterError where a file is empty, cut off or no such file; reads the head of the weights alone."""
    lora_options(folder)
    for file in (folder / CORE, parent_of(folder) / WEIGHTS) if is_core(folder) else (folder / WEIGHTS,):
        if not _shapes(file):
            raise AdapterError(f"{file}: holds no weights. {_ANEW}")


def lora_options(folder: Path) -> dict[str, Any]:
    """The adapter's `LoraConfig` as peft saved it; of a core that of its parent.

    Raises:
        AdapterError: it is missing or cannot be read; a core's parent is missing.
    """
    file = (parent_of(folder) if is_core(folder) else folder) / CONFIG
    config = read_json(file)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise AdapterError(f"{file}: is missing, empty or cut off, so the adapter cannot be used. {_ANEW}")
    return config


def is_core(folder: Path) -> bool:
    """Whether `folder` holds a core (see `model.lora_core`), not a plain LoRA."""
    return (folder / CORE).is_file()


def parent_of(folder: Path) -> Path:
    """The folder of what the core in `folder` stands in; its name is its fingerprint.

    Raises:
        AdapterError: it is not there, or the core does not name it.
    """
    named = (read_json(folder / METADATA) or {}).get("core")
    if not isinstance(named, dict) or not {"parent", "fingerprint"} <= set(named):
        raise AdapterError(f"{folder}: a core whose {METADATA} does not name what it stands in. {MEND_CORE}")
    parent = (folder / named["parent"]).resolve()
    if parent.name != named["fingerprint"] or not (parent / WEIGHTS).is_file() or not (parent / CONFIG).is_file():
        raise AdapterError(f"{folder}: a core, and what it stands in, {parent}, is missing. {MEND_CORE}")
    return parent


MEND_CORE = (
    "A core is of use only inside its fleet's folder (perce-lite export --to peft makes a plain LoRA of it). Put back "
    "what was moved, or train the user anew with perce-lite fleet RECIPE --retrain USER."
)


def _shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of a safetensors file; no number is read."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: is empty, cut off or damaged: {error}. {_ANEW}") from error


_ANEW = "Copy the whole folder once more from where it was trained, or train it anew."


def recipe_of(metadata: dict[str, Any]) -> Recipe:
    """The recipe that an adapter was trained with; the metadata hold the text of its chat template file."""
    recipe = Recipe.model_validate(metadata["recipe"])
    recipe.train.pop("chat_template_path", None)
    return recipe


def weights_bytes(folder: Path) -> int:
    """Bytes that the adapter in `folder`, the folder of its files, takes in memory: float32, a core as a plain LoRA.

    Raises:
        AdapterError: files that are missing or damaged.
    """
    file = (parent_of(folder) if is_core(folder) else folder) / WEIGHTS
    return _weights_bytes(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _weights_bytes(file: Path, written_ns: int) -> int:
    return 4 * sum(math.prod(shape) for shape in _shapes(file).values())
