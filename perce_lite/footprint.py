"""What a recipe's model and adapters are, without loading any weights."""

from pathlib import Path

import psutil
import torch
import xxhash
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from perce_lite import targets
from perce_lite.errors import ModelError, RecipeError
from perce_lite.models import model_source, not_there, with_adapter
from perce_lite.recipe import Recipe, lora_config, training_config


def config_of(recipe: Recipe) -> PretrainedConfig:
    """The model's configuration; no weights are read.

    Raises:
        ModelError: as `load_base`.
    """
    try:
        return AutoConfig.from_pretrained(model_source(recipe))
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


def users_at_once(recipe: Recipe) -> int:
    """`fleet.slots`; where it is `auto`, as many users as half of the free memory takes, 1 to 16.

    A user takes what is trained four times (weights, gradients, two moments) and what its rows keep for the backward,
    estimated for the longest row: 34 bytes a token, layer and hidden unit, or 2 with gradient checkpointing.
    """
    if recipe.fleet.slots != "auto":
        return recipe.fleet.slots
    args = training_config(recipe)
    config = config_of(recipe).get_text_config()
    kept = 2 if args.gradient_checkpointing else 34
    tokens = args.per_device_train_batch_size * (args.max_length or 1024)
    one = 4 * trained_bytes(recipe) + tokens * config.num_hidden_layers * config.hidden_size * kept
    free = psutil.virtual_memory().available if args.use_cpu else torch.cuda.mem_get_info()[0]
    return max(1, min(16, int(free / 2 / one)))
