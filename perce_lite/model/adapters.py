"""Adapters on disk: PEFT folders, written whole or not at all, that know which base and which data they come from."""

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from perce_lite.errors import AdapterError, NonFiniteLossError
from perce_lite.files import METADATA as METADATA
from perce_lite.files import folder_written_aside, read_json, write_json, write_text
from perce_lite.model.compat import is_lora_weight, lora_layers
from perce_lite.model.fingerprint import fingerprint, same_base, sketch
from perce_lite.model.lora_core import plain_state
from perce_lite.model.model_card import model_card
from perce_lite.recipe import Recipe

_PACKAGES = ("perce-lite", "torch", "transformers", "peft", "trl", "bitsandbytes")


def save(model: PeftModel, folder: Path, about: dict[str, Any]) -> None:
    """Writes `model`'s adapter to `folder` as PEFT does (safetensors), with `about` and the base in `perce_lite.json`.

    Raises:
        DiskFullError: no space left; NonFiniteLossError: weights that are no numbers. What was there before stays.
    """
    if not all(torch.isfinite(parameter).all() for name, parameter in model.named_parameters() if is_lora_weight(name)):
        raise NonFiniteLossError(f"The adapter's weights are not finite, so {folder} was not written. Lower the rate.")
    base: PreTrainedModel = model.get_base_model()
    known = {"base": {**sketch(base), "fingerprint": fingerprint(model)}, "versions": versions()}
    with folder_written_aside(folder) as aside:
        model.save_pretrained(aside, state_dict=plain_state(model))
        write_json(aside / METADATA, {**about, **known})
        write_text(aside / "README.md", model_card(about))


def read_metadata(folder: Path) -> dict[str, Any]:
    """What `perce_lite.json` says.

    Raises:
        AdapterError: the folder is not there, or holds no adapter of PerCE Lite.
    """
    if not folder.is_dir():
        raise AdapterError(
            f"{folder}: there is no such folder. An adapter lies in <output_dir>/adapter after training."
        )
    for nested in (folder, folder / "adapter"):
        card = read_json(nested / METADATA)
        if isinstance(card, dict) and (nested / "adapter_model.safetensors").is_file():
            _check(card, nested)
            return {**card, "folder": str(nested)}
    raise AdapterError(
        f"{folder}: no adapter of PerCE Lite: it needs adapter_model.safetensors, adapter_config.json and {METADATA}. "
        "Give the folder that `perce-lite train` named at its end."
    )


def same_pass(folder: Path, recipe: Recipe) -> None:
    """Raises AdapterError where the adapter in `folder` was not trained with the `profile_pass` of `recipe`."""
    theirs, ours = Recipe.model_validate(read_metadata(folder)["recipe"]).profile_pass, recipe.profile_pass
    if theirs != ours:
        raise AdapterError(
            f"{folder}: this adapter was trained with profile_pass: {theirs} and would be used with {ours}, which is "
            f"not what it learned. Add --set train.profile_pass={theirs}."
        )


def _check(card: dict[str, Any], folder: Path) -> None:
    """Raises AdapterError where `card` is not of this version's shape."""
    missing = [key for key in ("recipe", "base", "train_on", "chat_template", "run") if key not in card]
    try:
        if not missing:
            Recipe.model_validate(card["recipe"])
            return
    except ValidationError as error:
        missing = [".".join(map(str, fault["loc"])) for fault in error.errors()]
    written, here = card.get("versions", {}).get("perce-lite", "unknown"), importlib.metadata.version("perce-lite")
    whose = "an earlier state of this version" if written == here else f"another version, {written}; this is {here}"
    raise AdapterError(
        f"{folder}: its {METADATA} was written by PerCE Lite in {whose}. It does not fit in: {', '.join(missing)}. "
        "Train it anew, install what wrote it, or load the folder with peft."
    )


def load(base: PreTrainedModel, folder: Path) -> PeftModel:
    """`base` with the adapter of `folder` on it, frozen, float32, in eval mode.

    Raises:
        AdapterError: the folder holds no adapter, or one that was trained on another base.
    """
    card = read_metadata(folder)
    theirs = card["base"]
    ours = sketch(base)
    if not same_base(theirs, ours):
        raise AdapterError(
            f"{folder}: this adapter was trained on {card['recipe']['model']} ({_shape(theirs)}), not on the base that "
            f"is loaded ({_shape(ours)}). Load that base, or train an adapter for this one."
        )
    model: PeftModel = PeftModel.from_pretrained(base, card["folder"])
    for name, parameter in model.named_parameters():
        if is_lora_weight(name):
            parameter.data = parameter.data.to(torch.float32)
    return model.eval()


def start_from(model: PeftModel, folder: Path) -> None:
    """Gives `model`'s adapter the weights of the one in `folder`.

    Raises:
        AdapterError: no adapter there, or one of another shape or base.
    """
    card = read_metadata(folder)
    ours = sketch(model.get_base_model())
    weights = load_file(Path(card["folder"]) / "adapter_model.safetensors")
    missing = set(get_peft_model_state_dict(model)) ^ set(weights)
    if not same_base(card["base"], ours) or missing:
        raise AdapterError(
            f"{folder}: an adapter of another base or with other LoRA layers; nothing can start from it."
        )
    try:
        set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise AdapterError(f"{folder}: its LoRA layers have another rank than lora.r asks for: {error}") from error


@contextmanager
def on(base: PreTrainedModel, folder: Path | None) -> Iterator[PreTrainedModel | PeftModel]:
    """`base` with the adapter of `folder` on it for a while (None: the base alone); it is taken off again.

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
    """Takes every LoRA layer off `base`, whatever put it there."""
    for path, layer in lora_layers(base).items():
        base.set_submodule(path, layer.get_base_layer())
    base.__dict__.pop("peft_config", None)


def _shape(sketched: dict[str, Any]) -> str:
    kind, layers, width, vocabulary, _ = sketched["shape"]
    return f"{kind}, {layers} layers of {width}, vocabulary {vocabulary}"


def versions() -> dict[str, str]:
    """Versions of what an adapter depends on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
