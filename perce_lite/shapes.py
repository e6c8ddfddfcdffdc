"""Shapes of models: from their own configuration, or known by heart where that is not at hand; no weights are read."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from perce_lite.errors import ModelError, PlanError
from perce_lite.footprint import config_of
from perce_lite.recipe import Recipe

_SMOLLM2 = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True, "head_dim": 64}
_QWEN3 = {"vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128, "num_hidden_layers": 36}

_KNOWN: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "llama",
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", "unsloth/Meta-Llama-3.1-8B-Instruct"),
        dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False),
    ),
    "Qwen3-4B": (
        "qwen3",
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Instruct-2507"),
        dict(hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8,
             tie_word_embeddings=True, **_QWEN3),
    ),
    "Qwen3-8B": (
        "qwen3",
        ("Qwen/Qwen3-8B",),
        dict(hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8,
             tie_word_embeddings=False, **_QWEN3),
    ),
    "Gemma-3-4B": (
        "gemma3_text",
        ("google/gemma-3-4b-it", "google/gemma-3-4b-pt", "unsloth/gemma-3-4b-it"),
        dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8,
             num_key_value_heads=4, head_dim=256, vocab_size=262208, max_position_embeddings=131072,
             sliding_window=1024, tie_word_embeddings=True),
    ),
    "SmolLM2-1.7B": (
        "llama",
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-1.7B"),
        dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
             num_key_value_heads=32, **_SMOLLM2),
    ),
    "SmolLM2-135M": (
        "llama",
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M", "smollm2-135m"),
        dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
             num_key_value_heads=3, **_SMOLLM2),
    ),
}  # fmt: skip
"""Shapes known by heart, from the config.json that each model is published with on the Hub; of Gemma 3 the text part."""

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
    types = values.get("layer_types") or ["sliding_attention" if kind == "mistral" else "full_attention"] * layers
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
        windows=tuple(window if one == "sliding_attention" else None for one in types),
        eager=kind == "gemma2",
    )
