"""Adapters on disk: folders with metadata (`perce_lite.json`) that name their base, data and recipe.

What the files are stands in `adapter_files`; a folder that holds a core is loaded as the plain LoRA that it makes.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from perce_lite.config import DTYPES
from perce_lite.console import say
from perce_lite.errors import AdapterError, NonFiniteLossError, first_line
from perce_lite.files import METADATA as METADATA
from perce_lite.files import folder_written_aside, write_json, write_text
from perce_lite.model import adapter_weights
from perce_lite.model.adapter_files import PLAIN, WEIGHTS, Storage, is_core, parent_of, read_metadata
from perce_lite.model.compat import is_lora_weight, lora_layers, version_of
from perce_lite.model.fingerprint import fingerprint, has_layers, same_base, sketch
from perce_lite.model.lora_core import Cored, cored_of
from perce_lite.model.model_card import model_card

_PACKAGES = ("perce-lite", "torch", "transformers", "peft", "trl", "bitsandbytes")


def save(model: PeftModel, folder: Path, metadata: dict[str, Any], storage: Storage = PLAIN) -> None:
    """Writes `model`'s adapter to `folder`: its numbers, a model card, and `metadata` with base and versions added.

    The folder is written completely or not at all; on an error its earlier content stays.

    Raises:
        DiskFullError: no space left; NonFiniteLossError: weights that are not finite.
    """
    require_finite((weight for name, weight in model.named_parameters() if is_lora_weight(name)), folder)
    origin = origin_of(model)
    cored = cored_of(model)
    with folder_written_aside(folder) as aside:
        if cored is not None:
            config = copy.deepcopy(model.active_peft_config)
            config.inference_mode = True  # as peft saves it
            origin |= write_cored(aside, folder, cored, config, storage)
        else:
            model.save_pretrained(aside, state_dict=_stored_state(model, DTYPES[storage.dtype]))
        write_about(aside, {**metadata, **origin})


def write_cored(aside: Path, folder: Path, cored: Cored, config: LoraConfig, storage: Storage) -> dict[str, Any]:
    """Writes a core into `aside`, which becomes `folder`; gives what the metadata say of it.

    It becomes the plain LoRA that it makes where `storage` has no place for what it stands in.
    """
    if storage.parents is not None:
        return adapter_weights.write_core(aside, folder, cored, config, storage)
    write_plain(aside, cored.plain(), config, storage)
    return {}


def write_plain(aside: Path, state: Mapping[str, Tensor], config: LoraConfig, storage: Storage) -> None:
    """Writes a plain LoRA's tensors, by PEFT's names, and its configuration into `aside`."""
    adapter_weights.write_tensors(aside / WEIGHTS, state, DTYPES[storage.dtype])
    config.save_pretrained(str(aside))


def write_about(aside: Path, metadata: dict[str, Any]) -> None:
    """Writes metadata and model card into `aside`."""
    write_json(aside / METADATA, metadata)
    write_text(aside / "README.md", model_card(metadata))


def _stored_state(model: PeftModel, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """What peft saves of `model` where its adapter is stored as `dtype`; None: what it saves of itself, float32."""
    if dtype == torch.float32:
        return None
    state: dict[str, Tensor] = model.state_dict()
    return {name: tensor.to(dtype) if is_lora_weight(name) else tensor for name, tensor in state.items()}


def require_finite(weights: Iterable[Tensor], folder: Path) -> None:
    """Raises NonFiniteLossError where `weights`, of one device, that were to be written to `folder` are not finite."""
    if not all_finite(weights):
        raise NonFiniteLossError(f"The adapter's weights are not finite, so {folder} was not written. Lower the rate.")


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
        AdapterError: the folder holds no adapter, or one of another base; as `adapter_weights.tensors`.
    """
    files = _files_for(base, folder, metadata or read_metadata(folder))
    if is_core(files):
        numbers = adapter_weights.tensors(files)
        model = get_peft_model(base, _core_config(files), name)
        set_peft_model_state_dict(model, numbers, name)
        return _frozen(model)
    try:
        model = PeftModel.from_pretrained(base, str(files), adapter_name=name)
    except (ValueError, RuntimeError, SafetensorError) as error:  # what peft makes of an adapter of other layers
        raise AdapterError(f"{folder}: this adapter does not go on its base: {first_line(error)}") from error
    return _frozen(model)


def load_beside(model: PeftModel, folder: Path, name: str) -> PeftModel:
    """`model` with the adapter of `folder` beside those that it has, as `name`, and active. Raises as `load`."""
    files = _files_for(model.get_base_model(), folder, read_metadata(folder))
    if is_core(files):
        numbers = adapter_weights.tensors(files)
        model.add_adapter(name, _core_config(files))
        set_peft_model_state_dict(model, numbers, name)
    else:
        model.load_adapter(str(files), name)
    model.set_adapter(name, inference_mode=True)
    return _frozen(model)


def _core_config(folder: Path) -> LoraConfig:
    """The configuration of the plain LoRA that the core in `folder` makes."""
    config = LoraConfig.from_pretrained(str(parent_of(folder)))
    config.inference_mode = True
    return config


def _files_for(base: PreTrainedModel, folder: Path, metadata: dict[str, Any]) -> Path:
    """The folder of the files of the adapter in `folder`; raises AdapterError where `base` is not the one it is for."""
    loaded = sketch(base)
    trained_on = {"embedding": loaded["embedding"], **metadata["base"]}  # of another trainer's only the shape is known
    _say_of_an_early_sketch(metadata)
    if not same_base(trained_on, loaded):
        raise AdapterError(
            f"{folder}: this adapter was trained on {metadata['recipe']['model']} ({_shape(trained_on)}), not on the "
            f"base that is loaded ({_shape(loaded)}). Load that base, or train an adapter for this one."
        )
    return Path(metadata["folder"])


def _say_of_an_early_sketch(metadata: dict[str, Any]) -> None:
    if "embedding" in metadata["base"] and not has_layers(metadata["base"]):
        say(
            f"{metadata['folder']}: was saved by an earlier version, which noted only the embedding of its base: "
            "whether the layers are those that it was trained on is not known"
        )


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
    weights = adapter_weights.tensors(Path(metadata["folder"]))
    _say_of_an_early_sketch(metadata)
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
    return {name: version_of(name) for name in _PACKAGES}
