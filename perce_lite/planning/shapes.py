"""Shapes of models: from their own configuration, or known by heart where that is not at hand; no weights are read."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from perce_lite.errors import ModelError, PlanError
from perce_lite.model.footprint import config_of
from perce_lite.recipe import Recipe


def _sizes(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head: int,
    words: int,
    positions: int,
    tied: bool,
) -> dict[str, Any]:
    """The fields of a configuration that say how large a model is."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": words,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }


_KNOWN: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "llama",
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", "unsloth/Meta-Llama-3.1-8B-Instruct"),
        _sizes(4096, 14336, 32, 32, 8, 128, 128256, 131072, False),
    ),
    "Qwen3-4B": (
        "qwen3",
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Instruct-2507"),
        _sizes(2560, 9728, 36, 32, 8, 128, 151936, 40960, True),
    ),
    "Qwen3-8B": (
        "qwen3",
        ("Qwen/Qwen3-8B",),
        _sizes(4096, 12288, 36, 32, 8, 128, 151936, 40960, False),
    ),
    "Gemma-3-4B": (
        "gemma3_text",
        ("google/gemma-3-4b-it", "google/gemma-3-4b-pt", "unsloth/gemma-3-4b-it"),
        {**_sizes(2560, 10240, 34, 8, 4, 256, 262208, 131072, True), "sliding_window": 1024},
    ),
    "SmolLM2-1.7B": (
        "llama",
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-1.7B"),
        _sizes(2048, 8192, 24, 32, 32, 64, 49152, 8192, True),
    ),
    "SmolLM2-135M": (
        "llama",
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M", "smollm2-135m"),
        _sizes(576, 1536, 30, 9, 3, 64, 49152, 8192, True),
    ),
}
"""Shapes known by heart, from the config.json of each model on the Hub; of Gemma 3 the text part alone."""

KNOWN = {name: ids[0] for name, (_, ids, _) in _KNOWN.items()}
"""A short name of each shape known by heart: the Hub id that it is trained under."""


def known_config(model: str) -> PretrainedConfig | None:
    """The configuration of a model known by heart, by Hub id or short name; None of any other."""
    for name, (kind, ids, values) in _KNOWN.items():
        if model in (name, *ids):
            return AutoConfig.for_model(kind, **values)
    return None


def model_config(recipe: Recipe) -> tuple[PretrainedConfig, bool]:
    """The configuration of the recipe's model, and whether it is the model's own (else it is known by heart).

    Raises:
        ModelError: it can neither be read nor is it known.
    """
    known = known_config(recipe.model)
    try:
        return config_of(recipe), True
    except ModelError:
        if known is None:
            raise
        return known, False


_FOUR_NORMS = ("gemma2", "gemma3_text")
_NORM_OF_QUERY_AND_KEY = ("qwen3", "gemma3_text")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
"""Model types whose memory is known: tests compare each with a real toy model."""


@dataclass(frozen=True)
class Shape:
    """What of a model its activations depend on.

    norms: RMS norms of the hidden state in a layer; head_norms: whether query and key are normed too
    windows: of each layer, the tokens back that its attention sees; None: all
    eager: attention that builds the scores of all pairs of tokens, as soft-capping needs
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norms: int
    head_norms: bool
    windows: tuple[int | None, ...]
    eager: bool


def shape_of(config: PretrainedConfig) -> Shape:
    """The shape of the language model that a configuration describes.

    Raises:
        PlanError: a family whose layers nobody has looked into.
    """
    config = config.get_text_config()
    kind = config.model_type
    if kind not in FAMILIES:
        raise PlanError(
            f"plan: the memory of a model of type {kind} is not known beforehand; known are {', '.join(FAMILIES)}"
        )
    values = config.to_dict()
    layers = config.num_hidden_layers
    window = values.get("sliding_window")
    everywhere = "sliding_attention" if kind == "mistral" else "full_attention"  # both say nothing of single layers
    types = values.get("layer_types") or [everywhere] * layers
    return Shape(
        layers=layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=values.get("head_dim") or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        norms=4 if kind in _FOUR_NORMS else 2,
        head_norms=kind in _NORM_OF_QUERY_AND_KEY,
        windows=tuple(window if layer_type == "sliding_attention" else None for layer_type in types),
        eager=kind == "gemma2",
    )
