"""What a recipe's model and adapters are, without loading weights: its configuration, sizes, a hash of its files."""

from pathlib import Path

from perce_lite import export_targets as targets
from perce_lite.errors import RecipeError
from perce_lite.files import digest
from perce_lite.model.base import config_of as config_of
from perce_lite.model.base import model_source, with_adapter
from perce_lite.model.compat import is_lora_weight, lora_layers
from perce_lite.model.fingerprint import FileStamp, sampled_hash
from perce_lite.model.full_gpu import on_meta as on_meta
from perce_lite.recipe import Recipe, lora_config


def source_fingerprint(recipe: Recipe) -> str:
    """A hash that notices a changed base without loading it: names, sizes and samples of its weights' files.

    For a Hub id it is a hash of the id alone. Files that have not changed are read once a process.
    """
    named = recipe.model if recipe.model_path is None else ""
    return sampled_hash(f"{named} {recipe.quantization}", _weights_files(recipe))


def source_stamp(recipe: Recipe) -> str:
    """As `source_fingerprint`, and it changes whenever a file of the weights is written, whatever is written."""
    return digest([source_fingerprint(recipe), [str(FileStamp.of(path)) for path in _weights_files(recipe)]])


def _weights_files(recipe: Recipe) -> list[Path]:
    folder = Path(model_source(recipe))
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) if folder.is_dir() else []


def refuse_exports(recipe: Recipe) -> None:
    """Checks that every target in `export.to` can take what the recipe trains, base included; reads no weights.

    Raises:
        RecipeError: with every reason why a target cannot; ModelError: as `load_base`.
    """
    if not recipe.export.to:
        return
    config = config_of(recipe).get_text_config()
    lora = lora_config(recipe).to_dict()
    faults = [
        f"export.to: {target} cannot take this adapter: {fault}"
        for target in recipe.export.to
        for fault in [
            *targets.faults(target, lora, config.model_type, config.tie_word_embeddings, recipe.profile_pass),
            *base_faults(recipe, target),
        ]
    ]
    if faults:
        raise RecipeError(recipe.source, faults)


def base_faults(recipe: Recipe, target: str) -> list[str]:
    """Why `target` cannot take any adapter of the recipe's base (`export_targets.base_faults`); reads no weights.

    Raises:
        ModelError: as `load_base`.
    """
    config = config_of(recipe)
    return targets.base_faults(target, config.to_dict(), type(on_meta(config)).__name__ if target == "vllm" else "")


def adapter_bytes(recipe: Recipe) -> int:
    """Size of one adapter of the recipe, float32; no weights are read.

    Raises:
        ModelError: as `load_base`; RecipeError: a `lora` section that does not go with the model.
    """
    adapted = with_adapter(on_meta(config_of(recipe)), recipe)
    return 4 * sum(weight.numel() for name, weight in adapted.named_parameters() if is_lora_weight(name))


def trained_bytes(recipe: Recipe) -> int:
    """As `adapter_bytes`, of what is trained: with `lora.core_only` one r x r matrix a layer."""
    if not recipe.core_only:
        return adapter_bytes(recipe)
    model = with_adapter(on_meta(config_of(recipe)), recipe)
    ranks = [rank for layer in lora_layers(model).values() for rank in layer.r.values()]
    return 4 * sum(rank**2 for rank in ranks)
