"""What a script gives `PerCETrainer`, checked before anything is loaded: every reason against it in one error."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTTrainer

from perce_lite.config import PerCEConfig
from perce_lite.console import warn
from perce_lite.data.rows import DIALOGUES, NOT_TEXT, shape_of
from perce_lite.errors import ConfigError, DataError
from perce_lite.model.architecture import LARGE_SHARE, experts_in_16_bit, experts_share, refuse_storage
from perce_lite.model.base import text_tokenizer
from perce_lite.model.compat import lora_layers
from perce_lite.model.full_gpu import on_meta
from perce_lite.model.fused_head import head_adapter_faults

_REFUSED = {
    "data_collator": "the batch carries columns of its own",
    "compute_loss_func": "it would replace the weighted loss",
    "formatting_func": "a formatted text has no profile to drop; give prompt, completion and profile columns",
}


def as_trl_takes_them(trainer: SFTTrainer, model: Any, args: Any, *in_order: Any, **named: Any) -> dict[str, Any]:
    """The arguments of `SFTTrainer` behind `model` and `args`, by name; `train_dataset` is one of them.

    Raises:
        TypeError: an unknown or doubled argument, as of any function.
    """
    bound = inspect.signature(SFTTrainer.__init__).bind(trainer, model, args, *in_order, **named)
    given = {name: value for name, value in bound.arguments.items() if name not in ("self", "model", "args")}
    return {"train_dataset": None, **given}


def check_arguments(model: Any, args: PerCEConfig, given: Mapping[str, Any]) -> None:
    """Raises ConfigError with every reason why these arguments would not train what PerCE means.

    given: by `as_trl_takes_them`
    """
    faults = [f"{name}: {why}" for name, why in _REFUSED.items() if given.get(name) is not None]
    if not isinstance(args, PerCEConfig):
        faults.append(f"args: a PerCEConfig is needed, this is {type(args).__name__}")
    else:
        faults += _process_faults(args)
        if isinstance(model, str):
            faults += _device_faults((args.model_init_kwargs or {}).get("device_map"))
    faults += _model_faults(model) if isinstance(model, torch.nn.Module) else []
    faults += _adapter_faults(model, given.get("peft_config"))
    faults += _dataset_faults(given["train_dataset"], "train_dataset")
    evaluated = given.get("eval_dataset")
    several = evaluated if isinstance(evaluated, dict) else {"": evaluated}
    for name, rows in several.items():
        faults += _dataset_faults(rows, f"eval_dataset[{name!r}]" if name else "eval_dataset")
    if faults:
        raise ConfigError(faults)


def check_rows(rows: datasets.Dataset, name: str) -> None:
    """Raises ConfigError for a data set that reaches a trainer later on, such as in `evaluate`."""
    if faults := _dataset_faults(rows, name):
        raise ConfigError(faults)


def tokenizer_for(
    model: Any, args: PerCEConfig, processing_class: PreTrainedTokenizerBase | ProcessorMixin | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that the script gives, alone or in a processor, else that of the model.

    Raises:
        ConfigError: a model without a name, and no tokenizer.
    """
    if isinstance(processing_class, ProcessorMixin):
        tokenizer = copy.copy(processing_class.tokenizer)
        tokenizer.chat_template = tokenizer.chat_template or processing_class.chat_template
        return tokenizer
    if processing_class is not None:
        return processing_class
    source = model if isinstance(model, str) else model.config._name_or_path
    if not source:
        raise ConfigError(["processing_class: the model was made in memory, so nobody knows its tokenizer; give it"])
    options = {"trust_remote_code": True} if args.trust_remote_code else {}
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return text_tokenizer(source, **options, **({} if revision is None else {"revision": revision}))


def shapes_of(model: Any, args: PerCEConfig) -> PreTrainedModel:
    """`model`, or of its name a model without weights; refuses what no adapter is trained over, as `load_base`."""
    loaded = isinstance(model, torch.nn.Module)
    config = model.config if loaded else AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code)
    refuse_storage(config, str(model if not loaded else config._name_or_path or type(model).__name__))
    shapes = model if loaded or args.trust_remote_code else on_meta(config)
    in_4_bit = loaded and vars(model).get("is_loaded_in_4bit", False)
    if in_4_bit and (share := experts_share(shapes)) > LARGE_SHARE:
        warn(f"model: {experts_in_16_bit(share)}")
    return shapes


def _process_faults(args: PerCEConfig) -> list[str]:
    if args.world_size == 1:
        return []
    return [
        f"torchrun: {args.world_size} processes train together, and PerCE Lite trains in one: its figures and store "
        "would be those of one process alone. Start the script with python"
    ]


def _model_faults(model: torch.nn.Module) -> list[str]:
    if not isinstance(model, PeftModel):
        if lora_layers(model):
            return [
                "model: it has an adapter by transformers' add_adapter, and the counterfactual needs one that can be "
                "switched off: give the base with peft_config, or peft.get_peft_model(base, LoraConfig(...))"
            ]
    elif not any(parameter.requires_grad for parameter in model.parameters()):
        return ["model: nothing in it is trained; load its adapter with PeftModel.from_pretrained(is_trainable=True)"]
    return _spread_faults(model)


def _adapter_faults(model: Any, peft_config: Any) -> list[str]:
    if isinstance(model, PeftModel) and peft_config is not None:
        return ["peft_config: the model has an adapter already; leave peft_config out, or give the base alone"]
    peft = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    if peft is None:
        return ["peft_config: the counterfactual is the base with its adapters off, so there must be an adapter"]
    if not isinstance(peft, PeftConfig):
        return [f"peft_config: a LoraConfig is needed, this is {type(peft).__name__}"]
    if peft.peft_type != PeftType.LORA:
        return [f"peft_config: a LoraConfig is needed, this is {peft.peft_type.value}"]
    return _lora_faults(peft)


def _dataset_faults(rows: Any, what: str) -> list[str]:
    """Why a data set cannot be trained or reported on; lists of rows, and those that are tokenised, are ours."""
    if isinstance(rows, datasets.IterableDataset):
        return [f"{what}: a streaming data set cannot be scored before training, or reported on; use datasets.Dataset"]
    if isinstance(rows, dict):
        return [f"{what}: one data set is needed, this is a {type(rows).__name__} of {', '.join(map(str, rows))}"]
    if not isinstance(rows, datasets.Dataset):
        return []
    if rows.format["type"] == "custom":
        return [
            f"{what}: with_transform makes rows anew each time they are looked at, and they are scored once; use map"
        ]
    if not len(rows):
        raise DataError(f"{what}: there is no row in it")
    if set(rows.column_names) >= {"input_ids", "labels"} and what not in ("train_dataset", "eval_dataset"):
        return []
    return _column_faults(rows.column_names, what)


def _device_faults(device_map: Any) -> list[str]:
    """Why a `device_map` may put a model on several devices, which would train but not as it is scored."""
    several = device_map in ("auto", "balanced", "balanced_low_0", "sequential")
    if several or (isinstance(device_map, dict) and len(set(map(str, device_map.values()))) > 1):
        return [
            f"model_init_kwargs: device_map {device_map!r} may spread the model over several devices, and PerCE Lite "
            "trains on one; leave device_map out"
        ]
    return []


def _spread_faults(model: torch.nn.Module) -> list[str]:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) < 2:
        return []
    where = ", ".join(devices)
    return [f"model: it lies on {where}, and PerCE Lite trains on one device; load it with device_map={{'': 0}}"]


def _lora_faults(lora: LoraConfig) -> list[str]:
    """What would change the base itself, so that adapters off is not the base any more."""
    faults = []
    if lora.bias != "none":
        faults.append(f"lora: bias {lora.bias!r} trains the base's own biases; use 'none'")
    if str(lora.init_lora_weights).lower().startswith(("pissa", "olora", "loftq", "corda", "lora_ga")):
        faults.append(f"lora: init_lora_weights {lora.init_lora_weights!r} rewrites the base's weights; use true")
    return faults + head_adapter_faults(lora)


def _column_faults(names: Sequence[str], what: str) -> list[str]:
    has = set(names)
    if "input_ids" in has:
        return [f"{what}: it is tokenised already (input_ids), so there is no profile to drop; give texts"]
    if seen := sorted(has & set(NOT_TEXT)):
        return [f"{what}: {', '.join(seen)}: text alone is trained on; remove the column if the answers do without it"]
    if "profile" not in has:
        return [f"{what}: no profile column among {', '.join(names)}"]
    if shape_of(has) != "alpaca" and not has & set(DIALOGUES) and not {"prompt", "completion"} <= has:
        return [f"{what}: prompt and completion, or messages, are needed beside profile; it has {', '.join(names)}"]
    return []
