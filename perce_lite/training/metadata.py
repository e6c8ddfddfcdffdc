"""What an adapter's metadata (`perce_lite.json`) say of the training that made it: a recipe's, or a script's."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from perce_lite.config import PerCEConfig
from perce_lite.console import say
from perce_lite.data.rows import Row, of_split
from perce_lite.files import digest
from perce_lite.recipe import Recipe, Template, trains
from perce_lite.training.loss import Weighting

SCRIPT = "script"
"""Key of metadata that a script's trainer wrote: there is no recipe, and nobody knows where the rows lie."""


def mean_statistics(log_history: Sequence[Mapping[str, float]], store_hits: float) -> dict[str, float]:
    """`weight_statistics`, means over the logged steps of the last epoch, and the share of store hits."""
    steps = [log for log in log_history if "weight_mean" in log]
    last = [log for log in steps if log["epoch"] > steps[-1]["epoch"] - 1] if steps else []
    names = ("weight_mean", "share_above_min", "share_at_min", "share_at_max", "effective_tokens", "pir_mean")
    figures = {name: sum(log[name] for log in last) / len(last) for name in names} if last else {}
    return {**figures, "store_hits": store_hits}


def loss_curve(log_history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Of every logged step: `step`, `loss` (weighted) and `unweighted_loss`, nats a token, `learning_rate`."""
    names = ("step", "loss", "unweighted_loss", "learning_rate")
    return [{name: log[name] for name in names if name in log} for log in log_history if "unweighted_loss" in log]


def run_metadata(
    recipe: Recipe,
    args: PerCEConfig,
    chat_template: str,
    rows: Sequence[Row],
    kept: int,
    steps: int,
    run: str,
    figures: dict[str, Any],
    stopping: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What an adapter's metadata (`perce_lite.json`) say of its run.

    kept: training rows that were not dropped; steps: optimizer steps taken
    figures: `losses` and `weights` of the run
    stopping: `BestStep.figures`, whose step is that of the adapter; None: that is the last one
    """
    recorded = recipe.model_dump(mode="json")
    if recipe.data.path:  # the adapter does not lie beside the recipe
        recorded["data"]["path"] = str(recipe.data_path)
    if recipe.model_path is not None:
        recorded["model"] = str(recipe.model_path)
    return {
        "run": run,
        "recipe": recorded,
        "recipe_fingerprint": recipe.fingerprint(),
        "estimator": args.estimator,
        "train_on": args.train_on,
        "clip_min": args.clip_min,
        "clip_max": args.clip_max,
        "weighting": Weighting.of(args).formula,
        "data": {
            "fingerprint": digest([row.fingerprint() for row in rows]),
            "rows": kept,
            "users": len({row.user for row in of_split(rows, "train")}),
        },
        "steps": steps if stopping is None else stopping["kept_step"],
        **({} if stopping is None else {"early_stopping": stopping}),
        "chat_template": chat_template,
        "metrics": {
            "losses": [{key: value for key, value in loss.items() if key != "per_row"} for loss in figures["losses"]],
            "weights": figures["weights"],
        },
    }


def script_recipe(
    model: PeftModel, args: PerCEConfig, template: Template | None, max_profile_tokens: int | None
) -> Recipe:
    """The recipe that trains what a script trained, but for its data: what loads its adapter later on.

    A base that a script quantised otherwise than in NF4 is loaded unquantised.
    """
    base: PreTrainedModel = model.get_base_model()
    name = str(base.config._name_or_path)
    quantization = vars(base.config).get("quantization_config")
    options = {} if quantization is None else quantization if isinstance(quantization, dict) else quantization.to_dict()
    nf4 = bool(options.get("load_in_4bit")) and options.get("bnb_4bit_quant_type") == "nf4"
    if options and not nf4:
        kind = options.get("quant_method", "another kind")
        say(f"The base is quantised ({kind}), not in NF4: perce-lite's commands load it as its folder has it")
    fields = {
        "model": str(Path(name).absolute()) if name and Path(name).is_dir() else name,
        "quantization": "nf4" if nf4 else "none",
        "dtype": "float32" if args.autocast is None else str(args.autocast).removeprefix("torch."),
        "data": {},
        "profile": {"max_tokens": max_profile_tokens},
        "template": (template or Template()).model_dump(),
        "lora": _changed(model.active_peft_config.to_dict(), LoraConfig().to_dict(), _LORA_LEFT_OUT),
        "train": {name: value for name, value in _changed_options(args).items() if trains(name)},
    }
    return Recipe.model_validate(fields)


def trainer_metadata(
    recipe: Recipe,
    args: PerCEConfig,
    chat_template: str,
    rows: Sequence[Row],
    steps: int,
    weights: dict[str, float],
) -> dict[str, Any]:
    """As `run_metadata`, of what a trainer saves by itself: `rows` are those that it trains on."""
    training = [replace(row, split="train") for row in rows]
    run = digest([recipe.fingerprint(), [row.fingerprint() for row in training]])
    figures: dict[str, Any] = {"losses": [], "weights": weights}
    return run_metadata(recipe, args, chat_template, training, len(training), steps, run, figures)


_LORA_LEFT_OUT = {"base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type", "auto_mapping"}


def _changed_options(args: PerCEConfig) -> dict[str, Any]:
    """Fields of `args` that differ from its defaults and that a recipe can hold."""
    defaults = {field.name: field.default for field in dataclasses.fields(args) if field.init}
    given = {name: value for name, value in vars(args).items() if name in defaults}
    return _changed(given, defaults, _SET_BY_THE_CONFIG)


_SET_BY_THE_CONFIG = {
    "debug",
    "bf16",
    "fp16",
    "use_cpu",
    "assistant_only_loss",
    "model_init_kwargs",
    "chat_template_path",
}
"""Fields that `PerCEConfig` sets, or that a loaded adapter must not follow."""


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    """Plain values that differ from their default."""
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    return {
        name: value
        for name, value in plain.items()
        if name not in left_out and value != defaults.get(name) and isinstance(value, bool | int | float | str | list)
    }
