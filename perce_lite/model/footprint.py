"""What a recipe's model and adapters are, without loading any weights."""

from pathlib import Path

import torch
import xxhash
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from perce_lite import export_targets as targets
from perce_lite.errors import ModelError, RecipeError
from perce_lite.hub import hub_options
from perce_lite.model.base import model_source, not_there, with_adapter
from perce_lite.recipe import Recipe, lora_config


def config_of(recipe: Recipe) -> PretrainedConfig:
    """The model's configuration; no weights are read.

    Raises:
        ModelError: as `load_base`.
    """
    try:
        source = model_source(recipe)
        return AutoConfig.from_pretrained(source, **hub_options(source))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(not_there(recipe, error)) from error


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration with shapes alone: no weight has memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def source_fingerprint(recipe: Recipe) -> str:
    """A hash by which a changed base is noticed without loading it: names, sizes and samples of its weights' files.

    Of a Hub id it is the id alone.
    """
    folder = Path(model_source(recipe))
    state = xxhash.xxh3_128()
    state.update(f"{recipe.model if recipe.model_folder is None else ''} {recipe.quantization}".encode())
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        size = file.stat().st_size
        state.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for part in range(64):
                opened.seek(max(0, size - 4096) * part // 63)
                state.update(opened.read(4096))
    return str(state.hexdigest())


def refuse_exports(recipe: Recipe) -> None:
    """Asks every target in `export.to` whether it can take what the recipe trains, base included; reads no weights.

    Raises:
        RecipeError: with every reason why one cannot; ModelError: as `load_base`.
    """
    if not recipe.export.to:
        return
    config = config_of(recipe).get_text_config()
    lora = lora_config(recipe).to_dict()
    faults = [
        f"export.to: {target} cannot take this adapter: {fault}"
        for target in recipe.export.to
        for fault in targets.faults(target, lora, config.model_type, config.tie_word_embeddings, recipe.profile_pass)
    ]
    if faults:
        raise RecipeError(recipe.source, faults)


def adapter_bytes(recipe: Recipe) -> int:
    """Size of one adapter of the recipe, float32; no weights are read.

    Raises:
        ModelError: as `load_base`; RecipeError: a `lora` section that does not go with the model.
    """
    adapted = with_adapter(on_meta(config_of(recipe)), recipe)
    return 4 * sum(one.numel() for name, one in adapted.named_parameters() if ".lora_" in name)


def trained_bytes(recipe: Recipe) -> int:
    """As `adapter_bytes`, of what is trained: with `lora.core_only` a matrix of r x r a layer."""
    if not recipe.core_only:
        return adapter_bytes(recipe)
    model = with_adapter(on_meta(config_of(recipe)), recipe)
    ranks = (layer.r for layer in model.modules() if isinstance(layer, LoraLayer))
    return 4 * sum(rank**2 for one in ranks for rank in one.values())
