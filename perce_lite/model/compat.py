"""Everything that leans on the insides of another library, behind one door.

Each name says why it is needed (WHY) and what would happen if the other library changed it (IF CHANGED). A change that
nothing would notice is asserted here, or held by a test in `tests/test_compat.py`. All rooms import these names from
here; the two that `data/` needs below this room, `DataCollatorForLanguageModeling` and `pack_dataset` of TRL, fail at
their import if they move.

Behaviour of other libraries that has no name to import, and that tests hold:

- TRL computes its loss from `outputs.log_probs` alone (`training/trainer`). IF CHANGED, the weights of PerCE would not
  reach the loss: training would silently be plain SFT.
- TRL prepares the training set before the evaluation sets (`training/trainer`). IF CHANGED, an evaluation set would be
  taken for the training set.
- transformers writes `trainer_state.json` last into a checkpoint (`training/run`). IF CHANGED, a checkpoint that a kill
  left incomplete would be resumed from.
- `config.to_dict()` leaves the attention implementation out (`attention_implementation`). IF CHANGED, a store key would
  name it twice, which does no harm.
"""

import functools
import importlib.metadata
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    modeling_utils,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.loading_report import LoadStateDictInfo
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE, _use_triton
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, FusedCausalLMOutput, add_fused_lm_head

from perce_lite.errors import CompatibilityError

__all__ = ["TOKEN_CHUNK_SIZE", "Bnb4BitHfQuantizer", "FusedCausalLMOutput", "LoraLayer", "LoraLinear"]
"""Names of other libraries that are passed through as they are. IF CHANGED, the import above fails."""


@functools.cache
def version_of(package: str) -> str:
    """An installed package's version, read once a process: it stands in a file of the package's metadata."""
    return importlib.metadata.version(package)


def _incompatible(package: str, what: str) -> CompatibilityError:
    return CompatibilityError(
        f"{package} {version_of(package)}: {what}. This version of PerCE Lite does not know how to work with it: "
        "install the version that its pyproject.toml names."
    )


# torch


def write_count(tensor: Tensor) -> int:
    """How often `tensor` was written to in place, as autograd counts.

    WHY: to notice a base that was changed after it was hashed, and an input that was changed after it was copied.
    IF CHANGED: loud (AttributeError). That a write does count is tested.
    """
    return int(tensor._version)


def forward_hooks(model: nn.Module) -> dict[nn.Module, set[int]]:
    """The forward hooks of each module that has some, by number.

    WHY: with checkpointing peft, trl and transformers each hook the embedding for every training, and no one removes
    the hooks: in a fleet they pile up. IF CHANGED: loud (AttributeError). That none piles up is tested.
    """
    return {module: set(module._forward_hooks) for module in model.modules() if module._forward_hooks}


def restore_forward_hooks(model: nn.Module, before: dict[nn.Module, set[int]]) -> None:
    """Removes the forward hooks of `model` that are not among those `before`."""
    for module in model.modules():
        for number in [number for number in module._forward_hooks if number not in before.get(module, ())]:
            del module._forward_hooks[number]


# bitsandbytes


def keep_base_constant(model: nn.Module) -> None:
    """Forbids bitsandbytes to repack 4-bit weights in place during a no-grad forward on CPUs with AVX512-BF16.

    WHY: a training forward does not unpack them, so the base would change between scoring and training.
    IF CHANGED: silent, since setting an attribute that nothing reads is no error. So it is asserted.

    Raises:
        CompatibilityError: `Linear4bit` has no such switch.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            if not hasattr(module, "support_avx512bf16_for_cpu"):
                raise _incompatible("bitsandbytes", "Linear4bit has no attribute support_avx512bf16_for_cpu")
            module.support_avx512bf16_for_cpu = False


def quantisation_state(weight: Tensor) -> Any:
    """The `QuantState` of a 4-bit weight (its `absmax` and `as_dict(packed=True)` are used); None: not quantised.

    WHY: the constants of the quantisation are part of what a base computes with, so they belong to its hash.
    IF CHANGED: loud (AttributeError). That they are hashed is tested.
    """
    return weight.quant_state if isinstance(weight, bnb.nn.Params4bit) else None


# peft


def is_lora_weight(name: str) -> bool:
    """Whether a parameter of this name is an adapter's.

    WHY: peft has no other way to ask. IF CHANGED: silent, adapters would be hashed as part of the base; tested.
    """
    return ".lora_" in name


def is_base_weight(name: str) -> bool:
    """Whether a parameter of this name is the base's: neither LoRA nor a copy that peft trains whole.

    IF CHANGED: silent, as `is_lora_weight`; tested.
    """
    return not is_lora_weight(name) and "modules_to_save" not in name


def base_weight_name(name: str) -> str:
    """The name that a base's weight has in the bare base.

    WHY: a base hashes the same with adapters on it. IF CHANGED: the store would miss; tested.
    """
    return name.replace("base_model.model.", "").replace(".base_layer", "")


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Every LoRA layer of `model` by its path.

    WHY: its dictionaries `r`, `lora_A`, `lora_B`, `lora_alpha`, `scaling` and `lora_variant` (by adapter) are read and
    replaced for cores, slots and exports. IF CHANGED: loud (AttributeError).
    """
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


# transformers: loading


def error_of_a_conversion(error: BaseException) -> RuntimeError | None:
    """What the conversion of a weight met, of an error by which `from_pretrained` ends without saying so.

    WHY: transformers catches every error of a conversion, a full GPU's too, and keeps its text in `loading_info` alone,
    a local variable. IF CHANGED: a full GPU would be told as a model that is none; tested.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        info = frame.f_locals.get("loading_info")
        if isinstance(info, LoadStateDictInfo) and info.conversion_errors:
            text = next(iter(info.conversion_errors.values())).partition("\nError")[0]
            return RuntimeError(text.strip().splitlines()[-1])
    return None


@contextmanager
def no_dispatch() -> Iterator[None]:
    """Inside, `from_pretrained` loads each weight to where its `device_map` says, and accelerate adds no hooks.

    WHY: its hooks would bring a table that is kept on the host to the GPU in each forward, where
    `model/host_embedding` looks up rows on the host. IF CHANGED: loud (AttributeError) if renamed; that the table never
    takes memory of the GPU is tested.
    """
    dispatch = modeling_utils.accelerate_dispatch
    modeling_utils.accelerate_dispatch = lambda *args, **kwargs: None
    try:
        yield
    finally:
        modeling_utils.accelerate_dispatch = dispatch


# transformers: attention


def attention_implementation(model: PreTrainedModel) -> str:
    """The name of `model`'s attention, as `attn_implementation` takes it.

    WHY: it changes log-probs in their last bits, and `config.to_dict()` does not tell it. IF CHANGED: loud.
    """
    return str(model.config.get_text_config()._attn_implementation)


def attention_function(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' attention function `name` ("sdpa" or "eager") for an attention module.

    WHY: prefix attention calls it on longer keys. Each modelling file has an eager function of its own.
    IF CHANGED: loud (KeyError, AttributeError).
    """
    if name == "eager":
        modelling_file = inspect.getmodule(type(module))
        eager: Callable[..., tuple[Tensor, Tensor | None]] = vars(modelling_file)["eager_attention_forward"]
        return eager
    registered: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS[name]
    return registered


def register_attention(name: str, like: str, function: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    """Makes `function` selectable as `attn_implementation=name`; its masks are those of the implementation `like`.

    WHY: the registry of attention functions is the extension point that transformers documents. The registry of masks
    has no public way to ask for the function of another implementation. IF CHANGED: loud (KeyError).
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[like])


# transformers: caches, positions, mixtures


def key_values(cache: DynamicCache, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, heads, P, d) of a layer.

    WHY: a `DynamicCache` has no public way to read them. IF CHANGED: loud (AttributeError); that a cache without a
    configuration keeps every position is asserted, since a sliding layer would silently forget the first ones.
    """
    kept = cache.layers[layer]
    if type(kept) is not DynamicLayer:
        raise _incompatible("transformers", f"a DynamicCache without a configuration holds a {type(kept).__name__}")
    return kept.keys, kept.values


def keeps_every_position(cache: DynamicCache) -> bool:
    """Whether no layer of `cache` forgets positions, as those of a sliding window do, so that it can be cropped.

    WHY: transformers does not tell a cache that was cut from one that never held the positions. IF CHANGED: loud.
    """
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def split_cache(cache: DynamicCache, lengths: Sequence[int]) -> list[DynamicCache]:
    """A cache for each row of `cache`, cut to its length; `cache` is empty afterwards.

    WHY, IF CHANGED: as `key_values`. Layers leave `cache` one by one, so that never two copies of all are there.
    """
    rows = [DynamicCache() for _ in lengths]
    for layer in range(len(cache.layers)):
        keys, values = key_values(cache, 0)
        del cache.layers[0]
        for row, (own, length) in enumerate(zip(rows, lengths, strict=True)):
            own.update(keys[row : row + 1, :, :length], values[row : row + 1, :, :length], layer)
    return rows


def cache_bytes(cache: DynamicCache) -> int:
    """Size of all keys and values."""
    pairs = (key_values(cache, layer) for layer in range(len(cache.layers)))
    return sum(keys.nbytes + values.nbytes for keys, values in pairs)


def llama3_frequencies(config: PretrainedConfig) -> Tensor:
    """Inverse frequencies (d/2,) of Llama 3's rotary embedding.

    WHY: a GGUF file holds them as factors. IF CHANGED: loud (KeyError); a GGUF is proven on log-probs besides.
    """
    frequencies: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config)[0]
    return frequencies


def router_loss(config: PretrainedConfig, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss of a mixture of experts, unweighted.

    WHY: the fused head replaces the model's own forward, which adds it. Every mixture of transformers uses Mixtral's
    function. IF CHANGED: loud, and a test compares it with TRL's.
    """
    text = config.get_text_config()
    loss: Tensor = load_balancing_loss_func(router_logits, text.num_experts, text.num_experts_per_tok, attention_mask)
    return loss


# TRL: the fused head

VOCABULARY_CHUNK_SIZE: int = _CHUNKED_LOGPROB_CHUNK_SIZE
"""Logits exist as tiles of (TOKEN_CHUNK_SIZE, VOCABULARY_CHUNK_SIZE) at the most; the planner counts them.

IF CHANGED: loud at import if renamed; a test compares the planner with a real step.
"""


class HeadSettings(NamedTuple):
    """What TRL's fused head does with logits, besides projecting: scale, softcap, temperature, in float32 or not.

    outputs: per-token fields to compute, of `FusedCausalLMOutput`
    """

    temperature: float
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]
    final_logit_softcapping: float | None
    logit_scale: float


PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""Fields of `FusedCausalLMOutput` in the order in which `chunked_log_probs` gives them; a test compares them."""


def settings_of(fused_forward: Callable[..., Any]) -> HeadSettings:
    """The settings of a forward that `add_fused_lm_head` made.

    WHY: TRL knows how each family scales and softcaps its logits, and keeps that in the forward's closure alone.
    IF CHANGED: asserted; a test compares the results with TRL's forward on all toy families.

    Raises:
        CompatibilityError: it is not TRL's forward, or TRL keeps its settings elsewhere.
    """
    variables = inspect.getclosurevars(fused_forward).nonlocals
    missing = [name for name in HeadSettings._fields if name not in variables]
    if missing:
        raise _incompatible("trl", f"the forward of add_fused_lm_head has no {', '.join(missing)}")
    return HeadSettings(**{name: variables[name] for name in HeadSettings._fields})


def head_settings(model: PreTrainedModel, cast_lm_head_to_fp32: bool) -> HeadSettings:
    """The settings of the fused head that TRL would put on `model`, which keeps the forward that it has."""
    own = model.__dict__.get("forward")
    try:
        add_fused_lm_head(model, cast_lm_head_to_fp32=cast_lm_head_to_fp32)
        return settings_of(model.__dict__["forward"].__func__)
    finally:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.forward = own


def chunked_log_probs(
    hidden: Tensor, head: nn.Linear, targets: Tensor, settings: HeadSettings
) -> dict[str, Tensor | None]:
    """TRL's own kernel: the fields PER_TOKEN, each (N,) float32, of `targets` (N,) after `hidden` (N, H).

    WHY: it never builds the logits (N, V). IF CHANGED: loud; a test compares the results with TRL's forward.
    """
    autocast: AbstractContextManager[Any] = nullcontext()
    if settings.cast_lm_head_to_fp32:
        hidden, autocast = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
    with autocast:
        fields = ChunkedLogProbFunction.apply(
            hidden,
            head.weight,
            head.bias,
            targets,
            settings.temperature,
            VOCABULARY_CHUNK_SIZE,
            settings.final_logit_softcapping,
            settings.logit_scale,
            settings.outputs,
        )
    return dict(zip(PER_TOKEN, fields, strict=True))


def head_projects_scored_positions_only(device: torch.device) -> bool:
    """Whether TRL's own fused head leaves positions without a label out on this device: where it has Triton.

    WHY: elsewhere it projects every position, and with a long profile most of that is thrown away.
    IF CHANGED: loud at import if renamed; if TRL decided by something else, it would be slower or do the same twice.
    """
    return bool(_use_triton(device))


# TRL and transformers: the trainer

TRAINER_HOOKS = {
    "_prepare_dataset": ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
    "_set_signature_columns_if_needed": (),
    "_get_train_sampler": ("train_dataset",),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_prepare_inputs": ("inputs",),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
}
"""Methods of `SFTTrainer` that `training/` overrides or calls, with their parameters.

WHY: rows become pairs in `_prepare_dataset`; our columns survive `_set_signature_columns_if_needed`; the order of rows
is a resumed run's too (`_get_train_sampler`); a checkpoint with weights that are not finite is refused
(`_save_checkpoint`); metadata lie beside the weights (`_save`); a run that was finished before is loaded
(`_load_from_checkpoint`); the benchmark looks at a batch (`_prepare_inputs`). IF CHANGED: an override that is never
called is silent, so `require_trainer_hooks` asserts them.
"""

TRAINER_ATTRIBUTES = ("_metrics", "_signature_columns", "_tokenizer", "_total_train_tokens")
"""Attributes of an `SFTTrainer` that `training/` reads or writes; a test asserts them on a trainer.

WHY: figures in `_metrics` are averaged and logged with TRL's own. IF CHANGED: loud (AttributeError).
"""


def require_trainer_hooks(trainer: type) -> None:
    """Asserts that the class `trainer` still has `TRAINER_HOOKS`, called as the overrides expect.

    Raises:
        CompatibilityError: a method is gone or takes other arguments.
    """
    for name, parameters in TRAINER_HOOKS.items():
        owner = next((kind for kind in trainer.__mro__ if name in vars(kind)), None)
        taken = None if owner is None else tuple(inspect.signature(vars(owner)[name]).parameters)[1:]  # without self
        if taken != parameters:
            raise _incompatible("trl", f"SFTTrainer.{name} takes {taken}, not {parameters}")


def initialise(model: PreTrainedModel, module: nn.Module) -> None:
    """Gives a module the random weights that `model`'s class gives it.

    WHY: the benchmark makes a base of random weights without ever holding it unquantised. IF CHANGED: loud.
    """
    model._init_weights(module)
