"""The frozen base: loaded in 4 bit or unquantised, in the dtype that suits its device, with its tokenizer."""

import copy
import re
import shlex
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from perce_lite.config import chosen_dtype, pick_device
from perce_lite.data.chat_template import dated
from perce_lite.errors import BaseTooLargeError, DeviceError, ModelError, RecipeError, TemplateError, first_line
from perce_lite.files import read_json
from perce_lite.hub import hub_options, is_of_the_hub
from perce_lite.model.architecture import (
    LARGE_SHARE,
    experts_in_16_bit,
    experts_share,
    has_experts,
    model_class,
    reads_images,
    refuse_storage,
)
from perce_lite.model.builtin import BUILT_IN, built_in_folder
from perce_lite.model.compat import error_of_a_conversion, keep_base_constant, no_dispatch
from perce_lite.model.fingerprint import remember_fingerprint
from perce_lite.model.full_gpu import gpu_has_failed, gpu_is_full, on_meta, why_no_room
from perce_lite.model.gguf_base import gguf_folder
from perce_lite.model.host_embedding import keep_on_host, table_of
from perce_lite.model.loading_bars import loading_bars
from perce_lite.model.repeated_heads import repeat_heads_where_needed
from perce_lite.recipe import Recipe, lora_config


@dataclass(frozen=True)
class Base:
    """A frozen base with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(recipe: Recipe) -> Base:
    """The recipe's base on its device, frozen, in eval mode; its weights are hashed once a process.

    Raises:
        ModelError: not there, incomplete, or not a causal language model; says what to do offline. Or its embedding
            table cannot be kept on the host, as the recipe asks.
        DeviceError: CUDA is asked for and absent; BaseTooLargeError: it does not fit the GPU.
    """
    device = pick_device(recipe.device)
    dtype = chosen_dtype(recipe.dtype, device)
    tokenizer = load_tokenizer(recipe)
    # On a CPU the parts that stay unquantised are kept in float32; autocast makes the products fast.
    kept = torch.float32 if device.type == "cpu" else dtype
    model = _load_model(recipe, device, dtype=kept, quantization_config=_quantization(recipe, dtype))
    keep_base_constant(model)
    repeat_heads_where_needed(model, dtype)
    if recipe.embedding_on_host:
        keep_on_host(model)
    remember_fingerprint(model)
    return Base(model.eval().requires_grad_(False), tokenizer)


def _quantization(recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """NF4 with double quantisation, products in `dtype`; None: the recipe asks for an unquantised base."""
    if recipe.quantization != "nf4":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _load_model(recipe: Recipe, device: torch.device, **options: Any) -> PreTrainedModel:
    """The recipe's model on `device`, its table on the host where asked for; `options` of `from_pretrained`.

    Raises:
        ModelError, BaseTooLargeError: as `load_base`.
    """
    source, config = model_source(recipe), config_of(recipe)
    shapes = cache(partial(on_meta, config))
    placement, hosted = {"": device.type}, None
    if recipe.embedding_on_host and device.type != "cpu":
        placement[hosted := table_of(shapes())] = "cpu"
        if options["quantization_config"] is not None:  # bitsandbytes refuses weights on the host without it
            options["quantization_config"].llm_int8_enable_fp32_cpu_offload = True
    try:
        if device.type == "cuda":
            why = why_no_room(shapes(), options["dtype"], recipe.quantization == "nf4", hosted)
            if why is not None:
                raise _too_large(recipe, why)
        options = {**options, **hub_options(source), "device_map": placement}
        with (
            nullcontext() if hosted is None else no_dispatch(),
            loading_bars(lambda: shapes().num_parameters(), recipe.quantization == "nf4") as bars,
        ):
            return model_class(config).from_pretrained(source, **options, **bars)
    except ImportError as error:
        raise ModelError(f"model: {recipe.model} could not be loaded here: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        inner = error_of_a_conversion(error)
        full = error if gpu_is_full(error) else inner
        if full is not None and gpu_is_full(full):
            raise _too_large(recipe, first_line(full)) from full
        if gpu_has_failed(fault := inner or error):
            raise DeviceError(
                f"The GPU failed while {recipe.model} was loaded: {first_line(fault)}. nvidia-smi shows whether it is "
                "well; device: cpu goes without it."
            ) from error
        raise ModelError(not_there(recipe, error)) from error


def _too_large(recipe: Recipe, why: str) -> BaseTooLargeError:
    return BaseTooLargeError(
        f"model: {recipe.model} does not fit the GPU: {why}. Close other programs that use the GPU (nvidia-smi lists "
        "them), or set CUDA_VISIBLE_DEVICES= to go without it."
    )


def config_of(recipe: Recipe) -> PretrainedConfig:
    """The model's configuration; no weights are read.

    Raises:
        ModelError: as `load_base`; also for weights that are stored in what no adapter is trained over, and for experts
            that `quantization: nf4` would leave in 16 bit.
    """
    try:
        source = model_source(recipe)
        config = AutoConfig.from_pretrained(source, **hub_options(source))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(not_there(recipe, error)) from error
    refuse_storage(config, recipe.model)
    if recipe.quantization == "nf4" and has_experts(config):
        share = experts_share(on_meta(config))
        if share > LARGE_SHARE:
            raise ModelError(
                f"model: {recipe.model}: {experts_in_16_bit(share)}. Take a dense model, or quantization: none"
            )
    return config


def text_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; of one that reads images too, that of its processor, without the rest of it.

    options: of `from_pretrained`
    """
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    for name in ("chat_template.json", "processor_config.json"):  # where only the processor has a chat template
        if tokenizer.chat_template is None:
            file = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **options)
            settings = None if file is None else read_json(Path(file))
            tokenizer.chat_template = settings.get("chat_template") if isinstance(settings, dict) else None
    return tokenizer


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer alone, with the template of `train.chat_template_path` if it is set; no weights are read.

    A template that asks for today's date is told that of the recipe (`template.date`).

    Raises:
        ModelError: as `load_base`; TemplateError: no such template file.
    """
    try:
        source = model_source(recipe)
        tokenizer = text_tokenizer(source, **hub_options(source))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(not_there(recipe, error)) from error
    template_path = recipe.train.get("chat_template_path")
    if template_path is not None:
        tokenizer.chat_template = _template_of(recipe, template_path)
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = dated(tokenizer.chat_template, recipe.template.date)
    return tokenizer


def _template_of(recipe: Recipe, template_path: str) -> str:
    """The text of the recipe's chat template file; raises TemplateError."""
    file = recipe.chat_template_file
    if file is None:
        raise TemplateError(
            f"train.chat_template_path: there is no file {template_path}, neither in the recipe's own folder nor in "
            "the current one"
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"train.chat_template_path: {template_path} cannot be read as UTF-8: {error}") from error


def with_adapter(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """`model` with a new adapter on it, as the recipe's `lora` asks; on the meta device where the model is there.

    Raises:
        RecipeError: a `lora` section that does not go with the model.
    """
    shapes_alone = model.device.type == "meta"
    try:
        return get_peft_model(model, on_text_alone(lora_config(recipe), model), low_cpu_mem_usage=shapes_alone)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(recipe.source, [f"lora: does not go with {recipe.model}: {error}"]) from error


def on_text_alone(lora: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """`lora`, or of a model that reads more than text a copy that leaves the rest of it out."""
    if not (beside := modules_beside_text(model)):
        return lora
    lora = copy.copy(lora)
    lora.exclude_modules = _excluded(lora.exclude_modules, beside)
    return lora


def modules_beside_text(model: PreTrainedModel) -> list[str]:
    """Paths of the modules of a multimodal model that read no text, such as a vision tower's layers; else none.

    They never get LoRA: training is on text, and neither llama.cpp nor vLLM takes an adapter on them.
    """
    if not reads_images(model.config):
        return []
    of_text = {*model.get_decoder().modules(), model.get_output_embeddings()}
    return [path for path, module in model.named_modules() if not list(module.children()) and module not in of_text]


def _excluded(own: list[str] | str | None, paths: list[str]) -> list[str] | str:
    """`exclude_modules` of `peft.LoraConfig`: the recipe's `own` and `paths`."""
    if isinstance(own, str):  # a regular expression
        return "|".join([own, *map(re.escape, paths)])
    return [*(own or ()), *paths]


def model_source(recipe: Recipe) -> str:
    """What transformers loads: the built-in model's folder, the recipe's own, that of its GGUF file, or a Hub id.

    Raises:
        ModelError: the built-in model cannot be downloaded; the GGUF file is not there, or not one that is read.
    """
    if recipe.model in BUILT_IN:
        return str(built_in_folder(recipe.model))
    if recipe.model_folder is not None:
        return str(recipe.model_folder)
    if recipe.model_file is not None:
        return str(gguf_folder(recipe.model_file))
    if recipe.model.endswith(".gguf"):
        raise ModelError(
            f"model: {recipe.model}: there is no such file. A GGUF that was moved: set model: to its path."
        )
    return recipe.model


def not_there(recipe: Recipe, error: Exception) -> str:
    """The message of a `ModelError` for a model that could not be loaded, and what to do about it."""
    name = recipe.model
    if name in BUILT_IN:
        command = f"rm -r {shlex.quote(model_source(recipe))}"
        return f"model: {name} cannot be loaded: {first_line(error)} Its folder is made anew after: {command}"
    if recipe.model_file is not None:
        command = f"rm -r {shlex.quote(model_source(recipe))}"
        return f"model: {name} cannot be loaded: {first_line(error)} What was made of it is made anew after: {command}"
    if recipe.model_folder is not None:
        return f"model: {name} is a folder, but holds no language model with a tokenizer: {first_line(error)}"
    if not is_of_the_hub(error):
        return f"model: {name} was found, but cannot be loaded here: {type(error).__name__}: {first_line(error)}"
    return (
        f"model: {name} is neither built in ({', '.join(BUILT_IN)}), nor a folder, nor a GGUF file, nor could it be "
        f"loaded from the Hub: {first_line(error)} Offline: copy the model's folder to this machine and set model: to "
        "its path."
    )
