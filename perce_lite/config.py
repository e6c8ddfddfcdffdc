"""`PerCEConfig`: TRL's `SFTConfig`, nine fields of our own, and a verdict on every option that touches the loss."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from trl import SFTConfig

from perce_lite.choices import CHOICES
from perce_lite.console import say
from perce_lite.errors import ConfigError, DeviceError
from perce_lite.recipe_checks import tracker_faults

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


NO_MPS = "The Apple GPU (MPS) is not used, for nothing here was made for it or tried on it: training is on the CPU."


def pick_device(wanted: str = "auto") -> torch.device:
    """The device for `wanted`: `auto` (CUDA where there is one, else CPU), `cpu` or `cuda`.

    Raises:
        DeviceError: CUDA is asked for and absent.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "none, this is a CPU build"
        raise DeviceError(
            f"device: cuda was asked for, but torch sees no CUDA device (torch {torch.__version__}, CUDA {built}). "
            "Use device: auto or cpu, or install a CUDA build of torch and a driver."
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """What `device` is fast in: bf16, fp16 on a GPU without bf16, float32 on a CPU without bf16 instructions."""
    if device.type == "cuda":
        # A T4 (7.5) emulates bf16; real support starts with 8.0.
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    capabilities = torch.cpu.get_capabilities()
    fast_in_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_tile") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast_in_bf16 else torch.float32


def chosen_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The compute dtype for a recipe's `dtype`: the one named, or for `auto` what `device` is fast in."""
    return compute_dtype(device) if wanted == "auto" else DTYPES[wanted]


@dataclass(frozen=True)
class Verdict:
    """Whether an option of TRL's goes with PerCE. `refused` tells whether a config's value is; None: nothing to ask."""

    says: Literal["supported", "in part", "refused"]
    reason: str
    refused: Callable[["PerCEConfig"], bool] | None = None


_NEEDS_TRAINING_FORWARD = ("mixed", "bootstrap")

VERDICTS: dict[str, Verdict] = {
    "label_smoothing_factor": Verdict(
        "refused",
        "label smoothing computes its own loss from full logits and would leave the weights out",
        lambda c: c.label_smoothing_factor > 0,
    ),
    "loss_type": Verdict(
        "refused",
        "'dft' multiplies by the token's probability after the weights, so they would count twice; use 'nll'",
        lambda c: c.loss_type != "nll",
    ),
    "completion_only_loss": Verdict(
        "in part",
        "the tokens of a prompt have no counterfactual; leave it out or set true",
        lambda c: c.completion_only_loss is False,
    ),
    "assistant_only_loss": Verdict("supported", "true or false: the loss is always on the assistant's turns alone"),
    "neftune_noise_alpha": Verdict(
        "in part",
        "the noise falls on the training forward, which is the factual term of 'mixed' and 'bootstrap'; "
        "use estimator 'base', 'shuffled' or 'uniform'",
        lambda c: bool(c.neftune_noise_alpha) and c.estimator in _NEEDS_TRAINING_FORWARD,
    ),
    "packing": Verdict(
        "in part",
        "packing needs max_length, the length of a packed row",
        lambda c: bool(c.packing) and c.max_length is None,
    ),
    "packing_strategy": Verdict(
        "in part",
        "'bfd_split' and 'wrapped' cut responses in two; use 'bfd'",
        lambda c: bool(c.packing) and c.packing_strategy != "bfd",
    ),
    "eval_packing": Verdict(
        "refused",
        "evaluation rows are never packed, so that their loss does not depend on their neighbours; leave it out",
        lambda c: bool(c.eval_packing),
    ),
    "padding_free": Verdict(
        "refused",
        "without packing it saves nothing that train_sampling_strategy: group_by_length does not; use packing: true",
        lambda c: bool(c.padding_free) and not c.packing,
    ),
    "use_liger_kernel": Verdict(
        "refused",
        "Liger replaces layers after scoring, so weights and loss would come from different arithmetic",
        lambda c: bool(c.use_liger_kernel),
    ),
    "train_sampling_strategy": Verdict(
        "in part",
        "'batch_rebalance' has no order of its own to resume; use 'random', 'sequential' or 'group_by_length'",
        lambda c: c.train_sampling_strategy not in ("random", "sequential", "group_by_length"),
    ),
    "chat_template_path": Verdict(
        "in part",
        "another tokenizer's template may bring new tokens, which a frozen base does not know; give a .jinja file",
        lambda c: c.chat_template_path is not None and not c.chat_template_path.endswith((".jinja", ".j2")),
    ),
    "max_length": Verdict(
        "supported", "any positive number, or null: profile items are left out to fit, a response is never cut"
    ),
    "truncation_mode": Verdict(
        "refused", "nothing is ever truncated; leave it out", lambda c: c.truncation_mode != "keep_start"
    ),
    "shuffle_dataset": Verdict("supported", "rows are shuffled once before packing or batching"),
    "pad_to_multiple_of": Verdict("supported", "padding carries no loss"),
    "pad_token": Verdict("supported", "padding carries no loss; TRL would rather have it set in the tokenizer"),
    "eos_token": Verdict(
        "refused",
        "a turn ends with what the chat template writes, and check and generate know the tokenizer alone; set it there",
        lambda c: c.eos_token is not None,
    ),
    "dataset_kwargs": Verdict(
        "refused",
        "skip_prepare_dataset would leave rows without their counterfactual; leave dataset_kwargs out",
        lambda c: bool(c.dataset_kwargs),
    ),
    "dataset_num_proc": Verdict("supported", "any number: pairs are made in one process, and kept"),
    "auto_find_batch_size": Verdict(
        "refused",
        "a batch size that changes by itself cannot be resumed; set per_device_train_batch_size",
        lambda c: bool(c.auto_find_batch_size),
    ),
    "ignore_data_skip": Verdict(
        "refused", "a resumed run would see rows twice; leave it out", lambda c: bool(c.ignore_data_skip)
    ),
    "save_only_model": Verdict(
        "refused",
        "a checkpoint without its optimizer cannot be resumed; leave it out",
        lambda c: bool(c.save_only_model),
    ),
    "load_best_model_at_end": Verdict(
        "supported", "the best checkpoint stays beside the last, so a run that is resumed at its end takes it too"
    ),
    "bf16_full_eval": Verdict("refused", "it rewrites base and adapter in bf16", lambda c: c.bf16_full_eval),
    "fp16_full_eval": Verdict("refused", "it rewrites base and adapter in fp16", lambda c: c.fp16_full_eval),
    "torch_compile": Verdict(
        "refused",
        "the compiled forward would not be the one that scores; leave it out",
        lambda c: bool(c.torch_compile),
    ),
    "router_aux_loss_coef": Verdict("supported", "a mixture's load-balancing loss is added unweighted, as in TRL"),
    "dataloader_drop_last": Verdict("supported", "as in TRL"),
    "activation_offloading": Verdict(
        "in part",
        "activations move from a GPU to the host's memory; a CPU has no other place for them",
        lambda c: bool(c.activation_offloading) and bool(c.use_cpu),
    ),
    "tf32": Verdict(
        "supported", "scoring and training compute alike, and the store keeps them apart from exact float32"
    ),
    "average_tokens_across_devices": Verdict("supported", "there is one device, so true and false are the same"),
    "accelerator_config": Verdict(
        "in part",
        "one device has nothing to split or dispatch batches to; leave split_batches and dispatch_batches out, and "
        "give what remains as a mapping, not as a file",
        lambda c: _spreads_batches(c.accelerator_config),
    ),
    "deepspeed": Verdict("refused", "PerCE Lite trains on one device; leave it out", lambda c: bool(c.deepspeed)),
    "fsdp": Verdict("refused", "PerCE Lite trains on one device; leave it out", lambda c: bool(c.fsdp)),
    "parallelism_config": Verdict(
        "refused", "PerCE Lite trains on one device; leave it out", lambda c: c.parallelism_config is not None
    ),
    "compute_loss_func": Verdict("refused", "an argument of the trainer; it would replace the weighted loss"),
    "streaming data sets": Verdict(
        "refused", "the counterfactual is scored before training, so rows must be countable"
    ),
}
"""Every option of `SFTConfig` and `SFTTrainer` that touches the loss, the data or the batch."""


def _spreads_batches(accelerator_config: Any) -> bool:
    """Whether an `accelerator_config` splits or dispatches batches, or is a file, which nobody has looked into."""
    if accelerator_config is None or isinstance(accelerator_config, str):
        return accelerator_config is not None
    options = accelerator_config if isinstance(accelerator_config, dict) else vars(accelerator_config)
    return bool(options.get("split_batches") or options.get("dispatch_batches"))


@dataclass
class PerCEConfig(SFTConfig):
    """`SFTConfig` with the fields of PerContrast; all of `SFTConfig`'s keep their names and meaning.

    >>> PerCEConfig(output_dir="out", learning_rate=2e-4, estimator="base", clip_max=3.0).weighting
    'additive'

    Mixed precision follows the device unless `bf16` or `fp16` is given: bf16, fp16 on a GPU without it, float32
    on a CPU without bf16 instructions. A loss that is NaN is never filtered from the logs.

    Raises:
        ConfigError: every option that would make the loss something other than PerCE's, with the reason.
    """

    estimator: str = field(
        default="base",
        metadata={"help": "Where a token's weight comes from: base, mixed, bootstrap; controls: uniform, shuffled."},
    )
    weighting: str = field(
        default="additive",
        metadata={"help": "clip: the PIR in clip_min .. clip_max; additive: 1 + strength x clip(PIR, 0, clip_max)."},
    )
    strength: float = field(default=0.5, metadata={"help": "Slope of the additive weighting; above 0."})
    clip_min: float = field(
        default=0.8,
        metadata={"help": "Lower clip of the PIR, nats; at least 0; above it a token counts as personal in figures."},
    )
    clip_max: float = field(default=5.0, metadata={"help": "Upper clip of the PIR, nats."})
    normalize_weights: str = field(
        default="none", metadata={"help": "none, or mean: divide by the data set's mean weight under the base."}
    )
    train_on: str = field(
        default="factual",
        metadata={"help": "factual: loss with the profile in the prompt; counterfactual: without, same weights."},
    )
    profile_pass: str = field(
        default="full",
        metadata={
            "help": "full: the adapter is on for the whole row; frozen: off for the profile, whose KV cache is reused."
        },
    )
    store: str | None = field(
        default=None, metadata={"help": "Folder that keeps log-probs under the frozen base between runs; None: memory."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Off, so that a NaN is seen."})

    def __post_init__(self) -> None:
        if self.bf16 is None:
            device = torch.device("cpu") if self.use_cpu else pick_device()
            self.bf16 = not self.fp16 and compute_dtype(device) == torch.bfloat16
            self.fp16 = self.fp16 or (not self.bf16 and compute_dtype(device) == torch.float16)
        if not torch.cuda.is_available():
            if torch.backends.mps.is_available() and not self.use_cpu:
                say(NO_MPS)
            self.use_cpu = True
        faults = _own_faults(self) + [
            f"{name}: {getattr(self, name)!r} is refused: {verdict.reason}"
            for name, verdict in VERDICTS.items()
            if verdict.refused is not None and verdict.refused(self)
        ]
        if faults:
            raise ConfigError(faults)
        # The label mask is the assistant's turns in any case; TRL would demand a template with generation markers.
        self.assistant_only_loss = False
        super().__post_init__()
        self._n_gpu = min(1, self.n_gpu)  # several GPUs in one process would be DataParallel; the first GPU is taken

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype that forwards run in under autocast; None in float32."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None


def _own_faults(config: PerCEConfig) -> list[str]:
    """Faults of the nine fields, of how they go together, and of numbers that cannot be trained with."""
    faults = []
    for name, kind in CHOICES.items():
        allowed = get_args(kind)
        if getattr(config, name) not in allowed:
            faults.append(f"{name}: {getattr(config, name)!r} is not one of {', '.join(allowed)}")
    if not config.clip_min >= 0:  # NaN included
        faults.append(f"clip_min: {config.clip_min} is not at least 0, which would push tokens away (gradient ascent)")
    if not 0 < config.strength < float("inf"):
        faults.append(f"strength: {config.strength} is not above 0; estimator: uniform is plain SFT")
    if not config.clip_max >= config.clip_min:
        faults.append(f"clip_max: {config.clip_max} is not at least clip_min, {config.clip_min}")
    all_zero = config.weighting == "clip" and config.clip_max == 0
    if config.normalize_weights == "mean" and all_zero:
        faults.append("clip_max: 0 makes every weight 0, which has no mean to divide by")
    if config.train_on == "counterfactual" and config.estimator in _NEEDS_TRAINING_FORWARD:
        faults.append(
            f"train_on: 'counterfactual' does not go with estimator {config.estimator!r}, whose factual term is the "
            "training forward; use base, shuffled or uniform"
        )
    if config.profile_pass == "frozen" and config.train_on == "counterfactual":
        faults.append(
            "profile_pass: 'frozen' does not go with train_on 'counterfactual', whose training forward has no profile"
        )
    positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    faults += [
        f"{name}: {getattr(config, name)} is not at least 1" for name in positive if not getattr(config, name) >= 1
    ]
    if not 0 < config.learning_rate < float("inf"):
        faults.append(f"learning_rate: {config.learning_rate} is not above 0; 1e-5 to 1e-3 is usual for LoRA")
    if config.max_length is not None and config.max_length < 1:
        faults.append(f"max_length: {config.max_length} is not positive; give a number of tokens, or null")
    return faults + tracker_faults(config.report_to)
