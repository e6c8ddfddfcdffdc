"""Adapters on disk: PEFT folders with metadata (`perce_lite.json`) that name their base, data and recipe."""

import importlib.metadata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from perce_lite.errors import AdapterError, NonFiniteLossError, first_line
from perce_lite.files import METADATA as METADATA
from perce_lite.files import folder_written_aside, read_json, write_json, write_text
from perce_lite.model.builtin import BUILT_IN
from perce_lite.model.compat import is_lora_weight, lora_layers
from perce_lite.model.fingerprint import fingerprint, same_base, sketch
from perce_lite.model.foreign import FOREIGN, foreign_metadata
from perce_lite.model.lora_core import plain_state
from perce_lite.model.model_card import model_card
from perce_lite.recipe import Recipe

_WEIGHTS = "adapter_model.safetensors"
_PACKAGES = ("perce-lite", "torch", "transformers", "peft", "trl", "bitsandbytes")


def save(model: PeftModel, folder: Path, metadata: dict[str, Any]) -> None:
    """Writes `model`'s adapter to `folder`: PEFT's files, a model card, and `metadata` with base and versions added.

    The folder is written completely or not at all; on an error its earlier content stays.

    Raises:
        DiskFullError: no space left; NonFiniteLossError: weights that are not finite.
    """
    if not all_finite(parameter for name, parameter in model.named_parameters() if is_lora_weight(name)):
        raise NonFiniteLossError(f"The adapter's weights are not finite, so {folder} was not written. Lower the rate.")
    origin = origin_of(model)
    with folder_written_aside(folder) as aside:
        model.save_pretrained(aside, state_dict=plain_state(model))
        write_json(aside / METADATA, {**metadata, **origin})
        write_text(aside / "README.md", model_card(metadata))


def origin_of(model: PeftModel) -> dict[str, Any]:
    """What metadata say of `model`'s base, whose weights are hashed, and of the packages."""
    base: PreTrainedModel = model.get_base_model()
    return {"base": {**sketch(base), "fingerprint": fingerprint(model)}, "versions": versions()}


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers of these tensors, of one device, are finite; the host waits once, not once a tensor."""
    finite = [torch.isfinite(tensor).all() for tensor in tensors]
    return not finite or bool(torch.stack(finite).all())


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


def read_metadata(folder: Path, said: Said | None = None) -> dict[str, Any]:
    """The metadata of the adapter in `folder` or in `folder/adapter`, with `folder`, the folder of its files, added.

    An adapter of another trainer (a LoRA of peft's without our metadata) has those that its base and `said` give.

    Raises:
        AdapterError: the folder is not there, holds no adapter, or one of an incompatible version.
        TemplateError: an adapter of another trainer, and no chat template anywhere.
    """
    said = said or Said()
    if not folder.is_dir():
        raise AdapterError(
            f"{folder}: there is no such folder. An adapter lies in <output_dir>/adapter after training."
        )
    for nested in (folder, folder / "adapter"):
        metadata, config = read_json(nested / METADATA), read_json(nested / "adapter_config.json")
        if not (nested / _WEIGHTS).is_file():
            continue
        if isinstance(metadata, dict):
            if said.template is not None and FOREIGN not in metadata:
                raise AdapterError(f"{folder}: --template is for adapters of other trainers; this one has its own")
            _check(metadata, nested)
            if not (said.model or metadata["recipe"]["model"]):
                raise AdapterError(f"{folder}: its {METADATA} names no base: give --model FOLDER")
            found = _with_base_found(metadata, nested)
            return {**found, "recipe": _as_said(found["recipe"], said), "folder": str(nested)}
        if isinstance(config, dict) and not (nested / METADATA).exists():
            return foreign_metadata(nested, config, said.model, said.data, said.template)
    raise AdapterError(
        f"{folder}: no adapter of PerCE Lite, nor another trainer's: it needs {_WEIGHTS} and adapter_config.json. "
        "Give the folder that `perce-lite train` named at its end, or that a trainer saved."
    )


def given_away(metadata: dict[str, Any]) -> dict[str, Any]:
    """`metadata` as an export has them: without paths of this machine, names of users and tokens of the Hub.

    A base that is a folder is called by the folder's name.
    """
    recipe = metadata["recipe"]
    public = {name: value if name == "template" else _without_paths(value) for name, value in recipe.items()}
    public["model"] = base_name(recipe["model"])
    public["data"] = {name: value for name, value in public["data"].items() if name not in ("path", "users")}
    return {**{name: value for name, value in metadata.items() if name != "folder"}, "recipe": public}


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
    model, config = metadata["recipe"]["model"], read_json(folder / "adapter_config.json")
    place = Path((config.get("base_model_name_or_path") or "") if isinstance(config, dict) else "")
    if model in BUILT_IN or not place.is_absolute() or place.name != model or not place.is_dir():
        return metadata
    return {**metadata, "recipe": {**metadata["recipe"], "model": str(place)}}


def _as_said(recipe: dict[str, Any], said: Said) -> dict[str, Any]:
    """An adapter's recipe with another model or other data."""
    data = recipe["data"] if said.data is None else {**recipe["data"], "path": str(said.data.absolute()), "hub": None}
    return {**recipe, "model": said.model or recipe["model"], "data": data}


def require_profile_pass(folder: Path, recipe: Recipe) -> None:
    """Raises AdapterError if the adapter in `folder` was not trained with the `profile_pass` of `recipe`."""
    theirs, ours = Recipe.model_validate(read_metadata(folder)["recipe"]).profile_pass, recipe.profile_pass
    if theirs != ours:
        raise AdapterError(
            f"{folder}: this adapter was trained with profile_pass: {theirs} and would be used with {ours}, which is "
            f"not what it learned. Add --set train.profile_pass={theirs}."
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


def weights_bytes(folder: Path) -> int:
    """Bytes that the weights of the adapter in `folder`, the folder of its files, take in memory."""
    return (folder / _WEIGHTS).stat().st_size


def load(
    base: PreTrainedModel, folder: Path, name: str = "default", metadata: dict[str, Any] | None = None
) -> PeftModel:
    """`base` with the adapter of `folder` on it, frozen, float32, in eval mode.

    name: what peft calls the adapter
    metadata: of the adapter, where they were read already

    Raises:
        AdapterError: the folder holds no adapter, or an adapter that was trained on another base.
    """
    files = _files_for(base, folder, metadata or read_metadata(folder))
    try:
        model: PeftModel = PeftModel.from_pretrained(base, files, adapter_name=name)
    except (ValueError, RuntimeError, SafetensorError) as error:  # what peft makes of an adapter of other layers
        raise AdapterError(f"{folder}: this adapter does not go on its base: {first_line(error)}") from error
    return _frozen(model)


def load_beside(model: PeftModel, folder: Path, name: str) -> PeftModel:
    """`model` with the adapter of `folder` beside those that it has, as `name`, and active. Raises as `load`."""
    model.load_adapter(_files_for(model.get_base_model(), folder, read_metadata(folder)), name)
    model.set_adapter(name, inference_mode=True)
    return _frozen(model)


def _files_for(base: PreTrainedModel, folder: Path, metadata: dict[str, Any]) -> str:
    """The folder of the files of the adapter in `folder`; raises AdapterError where `base` is not the one it is for."""
    loaded = sketch(base)
    trained_on = {"embedding": loaded["embedding"], **metadata["base"]}  # of another trainer's only the shape is known
    if not same_base(trained_on, loaded):
        raise AdapterError(
            f"{folder}: this adapter was trained on {metadata['recipe']['model']} ({_shape(trained_on)}), not on the "
            f"base that is loaded ({_shape(loaded)}). Load that base, or train an adapter for this one."
        )
    return str(metadata["folder"])


def _frozen(model: PeftModel) -> PeftModel:
    """`model` in eval mode, its LoRA weights float32."""
    for name, parameter in model.named_parameters():
        if is_lora_weight(name):
            parameter.data = parameter.data.to(torch.float32)
    return model.eval()


def start_from(model: PeftModel, folder: Path) -> None:
    """Copies the weights of the adapter in `folder` into `model`'s adapter.

    Raises:
        AdapterError: no adapter there, or its shape or base is another.
    """
    metadata = read_metadata(folder)
    weights = load_file(Path(metadata["folder"]) / _WEIGHTS)
    same_layers = set(get_peft_model_state_dict(model)) == set(weights)
    if not same_layers or not same_base(metadata["base"], sketch(model.get_base_model())):
        raise AdapterError(
            f"{folder}: an adapter of another base or with other LoRA layers; nothing can start from it."
        )
    try:
        set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise AdapterError(f"{folder}: its LoRA layers have another rank than lora.r asks for: {error}") from error


@contextmanager
def attached(base: PreTrainedModel, folder: Path | None) -> Iterator[PreTrainedModel | PeftModel]:
    """`base` with the adapter of `folder` on it inside the block; None: the base alone.

    Raises:
        AdapterError: as `load`.
    """
    if folder is None:
        yield base
        return
    model = load(base, folder)
    try:
        yield model
    finally:
        model.unload()


def strip(base: PreTrainedModel) -> None:
    """Removes every LoRA layer from `base`, whoever added it."""
    for path, layer in lora_layers(base).items():
        base.set_submodule(path, layer.get_base_layer())
    base.__dict__.pop("peft_config", None)


def _shape(sketch_of_base: dict[str, Any]) -> str:
    kind, layers, width, vocabulary, _ = sketch_of_base["shape"]
    return f"{kind}, {layers} layers of {width}, vocabulary {vocabulary}"


def versions() -> dict[str, str]:
    """Versions of the packages that an adapter depends on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
