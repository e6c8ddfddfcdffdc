"""Adapters on disk: PEFT folders with metadata (`perce_lite.json`) that name their base, data and recipe."""

import importlib.metadata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from perce_lite.errors import AdapterError, NonFiniteLossError, first_line
from perce_lite.files import METADATA as METADATA
from perce_lite.files import folder_written_aside, write_json, write_text
from perce_lite.model.adapter_files import WEIGHTS, read_metadata
from perce_lite.model.compat import is_lora_weight, lora_layers
from perce_lite.model.fingerprint import fingerprint, same_base, sketch
from perce_lite.model.lora_core import plain_state
from perce_lite.model.model_card import model_card

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
    weights = load_file(Path(metadata["folder"]) / WEIGHTS)
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
