"""What a checkpoint says of itself: the class it loads as, what its weights are stored in, and its experts."""

from typing import Any

import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from perce_lite.errors import ModelError

_NOT_LOADED = {"mxfp4": "MXFP4", "fp8": "FP8", "fbgemm_fp8": "FP8", "modelopt": "ModelOpt's 4 or 8 bit"}
"""Ways of storing weights that neither NF4 is made of nor an adapter trains over here, and what they are called."""


def model_class(config: PretrainedConfig) -> Any:
    """What has the `from_pretrained` of a checkpoint: the class that it names, if that is a language model.

    TRL loads that class too, so that parameters, and adapters on them, have the same names in a script and in a
    command. Else it is the automatic class, of language models or of those that look at images beside.
    """
    named = getattr(transformers, (config.architectures or [""])[0] or "", None)
    mappings = {
        AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    fitting = {auto: mapping[type(config)] for auto, mapping in mappings.items() if type(config) in mapping}
    known = {kind for kinds in fitting.values() for kind in (kinds if isinstance(kinds, tuple) else (kinds,))}
    if named in known:
        return named
    return next(iter(fitting), AutoModelForCausalLM)


def reads_images(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration has parts beside its language model."""
    return config is not config.get_text_config()


def refuse_storage(config: PretrainedConfig, name: str) -> None:
    """Raises ModelError where the weights of the checkpoint `name` are stored in what cannot be trained over here."""
    quantization = vars(config).get("quantization_config") or {}
    options = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(options.get("quant_method", "")).rpartition(".")[2].lower()
    kind = "FP8" if method == "compressed-tensors" and "float" in str(options) else _NOT_LOADED.get(method)
    if kind is not None:
        raise ModelError(
            f"model: {name} is stored in {kind} (quantization_config in its config.json), over which no adapter is "
            "trained here. Take the same model in bf16, which quantization: nf4 makes 4 bit, or one that bitsandbytes "
            "has made 4 bit."
        )


def has_experts(config: PretrainedConfig) -> bool:
    """Whether the language model is a mixture of experts, by its configuration."""
    return any("expert" in name and value for name, value in config.get_text_config().to_dict().items())


def experts_share(model: nn.Module) -> float:
    """Share of the weights that are experts in one tensor (E, in, out), which bitsandbytes leaves in 16 bit."""
    weights = list(model.parameters())
    experts = [
        weight
        for module in model.modules()
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for weight in module.parameters(recurse=False)
        if weight.dim() == 3 and weight.is_floating_point()
    ]
    return sum(weight.numel() for weight in experts) / max(1, sum(weight.numel() for weight in weights))


LARGE_SHARE = 0.05
"""Of the weights: experts below it change no plan."""


def experts_in_16_bit(share: float) -> str:
    """The sentence that says what nf4 leaves as it is."""
    return (
        f"its experts, {share:.0%} of the weights, lie in tensors that bitsandbytes does not quantise, so nf4 would "
        "leave them in 16 bit"
    )
