"""Faults of a recipe, one sentence each: where, what was given, what is allowed, the nearest valid name."""

import difflib
import importlib.util
import types
import typing
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from perce_lite import export_targets as targets
from perce_lite.choices import CHOICES
from perce_lite.recipe_fields import Target, fields_of, generation_options
from perce_lite.recipe_yaml import Lines, where

_MEANT = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "modules": "target_modules",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}
"""Other programs' names of an option, which are not written alike."""


def nearest(name: str, allowed: typing.Iterable[str]) -> str:
    allowed = sorted(allowed)
    near = _like(name, allowed)
    if near:
        return f"did you mean {near}?"
    return f"allowed: {', '.join(allowed)}" if len(allowed) < 30 else f"{len(allowed)} names are allowed, none like it"


def _elsewhere(name: str) -> str | None:
    """What to say of a key of `train:` or `lora:` that was written without its section."""
    if "." in name:
        return None
    targets: tuple[tuple[str, Target], ...] = (("train", "PerCEConfig"), ("lora", "LoraConfig"))
    for section, target in targets:
        if name in fields_of(target):
            return f"did you mean {section}.{name}?"
    return None


def _like(name: str, allowed: typing.Sequence[str]) -> str | None:
    """What was meant, as it seems."""
    meant = _MEANT.get(name.lower())
    near = [meant] if meant in allowed else difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return near[0] if near else None


def pydantic_fault(fault: Any, root: type[BaseModel], lines: Lines) -> str:
    at = tuple(fault["loc"])
    name = ".".join(map(str, at))
    if fault["type"] == "extra_forbidden":
        section = root
        for part in at[:-1]:
            annotation = section.model_fields[str(part)].annotation
            assert isinstance(annotation, type)
            section = annotation
        return f"{where(at, lines)}unknown key {name}; {_elsewhere(name) or nearest(str(at[-1]), section.model_fields)}"
    if fault["type"] == "missing":
        return f"{name}: is missing"
    message = fault["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"{where(at, lines)}{name}: {fault['input']!r} {message}"


def cross_faults(plain: dict[str, Any], lines: Lines) -> list[str]:
    """Faults of keys that do not go together."""
    faults = []
    data = plain.get("data")
    if isinstance(data, dict) and (data.get("path") is None) == (data.get("hub") is None):
        faults.append(f"{where(('data',), lines)}data: give path (a file) or hub (a data set of the Hub), one of them")
    if isinstance(data, dict) and isinstance(data.get("columns"), dict):
        faults += _column_faults(data["columns"], lines)
    template = plain.get("template")
    wrapper = template.get("profile") if isinstance(template, dict) else None
    if isinstance(wrapper, str) and "{profile}" not in wrapper:
        faults.append(f"{where(('template', 'profile'), lines)}template.profile: has no {{profile}} in it")
    item = template.get("item") if isinstance(template, dict) else None
    if isinstance(item, str) and "{text}" not in item:
        faults.append(f"{where(('template', 'item'), lines)}template.item: has no {{text}} in it")
    return faults + _core_faults(plain, lines)


def _core_faults(plain: dict[str, Any], lines: Lines) -> list[str]:
    """`lora.core_only` beside what is no plain LoRA, and in a fleet where no adapter starts from another."""
    lora, rule = plain.get("lora"), plain.get("fleet", {})
    if not isinstance(lora, dict) or lora.get("core_only") is not True or not isinstance(rule, dict):
        return []
    faults = [
        f"{where(('lora', name), lines)}lora.{name}: lora.core_only goes with plain LoRA on linear layers alone; leave "
        "one of the two out"
        for name in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
        if lora.get(name)
    ]
    group_by, init_from = rule.get("group_by", "user"), rule.get("init_from", "auto")
    if group_by == "all" or init_from == "none" or (group_by == "cohort" and init_from != "all"):
        at = where(("lora", "core_only"), lines)
        faults.append(
            f"{at}lora.core_only: with fleet.group_by {group_by} and fleet.init_from {init_from} no adapter starts "
            "from another, and a core needs one; take group_by user with init_from auto, cohort or all"
        )
    return faults


def _column_faults(columns: dict[str, Any], lines: Lines) -> list[str]:
    """Columns of the file that are given two of our names: a record can tell only one of them."""
    ours_of: dict[str, list[str]] = {}
    for ours, column in columns.items():
        ours_of.setdefault(str(column), []).append(str(ours))
    return [
        f"{where(('data', 'columns', ours[-1]), lines)}data.columns: {' and '.join(ours)} are both taken from the "
        f"column {column}; a column has one name, so leave all but one of them out"
        for column, ours in ours_of.items()
        if len(ours) > 1
    ]


def export_faults(plain: dict[str, Any], lines: Lines) -> list[str]:
    """Why a target that the recipe names cannot take what `lora` asks for; asked of a recipe without other faults."""
    profile_pass = (plain.get("train") or {}).get("profile_pass", "full")
    return [
        f"{where(('export', 'to'), lines)}export.to: {target} cannot take this adapter: {fault}"
        for target in plain.get("export", {}).get("to", [])
        for fault in targets.faults(target, plain.get("lora") or {}, profile_pass=str(profile_pass))
    ]


def third_party_faults(plain: dict[str, Any], lines: Lines) -> list[str]:
    """Checks `train:` and `lora:` against the fields of the classes that they are passed to."""
    fleet = plain.get("fleet")
    of_users = fleet.get("train") if isinstance(fleet, dict) else None
    sections: dict[tuple[str, ...], Any] = {("train",): plain.get("train"), ("lora",): plain.get("lora")}
    sections["fleet", "train"] = of_users
    faults = _generation_faults(plain, lines)
    if not any(isinstance(values, dict) and values for values in sections.values()):
        return faults
    of_train = fields_of("PerCEConfig")
    of_lora = {**fields_of("LoraConfig"), "core_only": bool}
    kinds = {("train",): of_train, ("lora",): of_lora, ("fleet", "train"): of_train}
    for path, values in sections.items():
        if not isinstance(values, dict):
            continue
        section, hints = ".".join(path), kinds[path]
        for name, value in values.items():
            at = where((*path, name), lines)
            if name not in hints:
                faults.append(f"{at}unknown key {section}.{name}; {nearest(str(name), hints)}")
            elif (complaint := _type_fault(hints[name], value)) is not None:
                faults.append(f"{at}{section}.{name}: {value!r} is not {complaint}")
    return faults


_TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "neptune": ("neptune",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
}
"""What `report_to` may name, with the packages of which it needs one."""

_OTHER_TRACKERS = ("none", "all", "azure_ml", "flyte", "kubeflow")
"""What else it may name, where transformers itself says what is absent."""

_EXTRAS = ("tensorboard", "wandb", "trackio")


def tracker_faults(report_to: Any) -> list[str]:
    """Trackers that `report_to` names and that are unknown or not installed, the latter with what installs them."""
    faults = []
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        packages = _TRACKERS.get(name, ())
        if name not in (*_TRACKERS, *_OTHER_TRACKERS):
            faults.append(f"report_to: there is no tracker {name}; {nearest(str(name), [*_TRACKERS, 'none'])}")
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            source = f"'perce-lite[{name}]'" if name in _EXTRAS else packages[0]
            faults.append(f"report_to: {name} is not installed; pip install {source} brings it; or say none")
    return faults


def choice_faults(plain: dict[str, Any], lines: Lines) -> list[str]:
    """Fields of `train:` with a value that is not allowed, for recipes whose other faults prevent a config."""
    train = plain.get("train")
    faults = []
    for name, kind in CHOICES.items():
        allowed = typing.get_args(kind)
        if isinstance(train, dict) and name in train and train[name] not in allowed:
            near = _like(str(train[name]), allowed)
            mend = f"; did you mean {near}?" if near else ""
            at = where(("train", name), lines)
            faults.append(f"{at}train.{name}: {train[name]!r} is not one of {', '.join(allowed)}{mend}")
    return faults


def _generation_faults(plain: dict[str, Any], lines: Lines) -> list[str]:
    """Names in `evaluation.generation` that transformers' GenerationConfig does not have."""
    evaluation = plain.get("evaluation")
    generation = evaluation.get("generation") if isinstance(evaluation, dict) else None
    if not isinstance(generation, dict) or not generation:
        return []
    allowed = generation_options() - {"max_new_tokens"}
    return [
        f"{where(('evaluation', 'generation', name), lines)}unknown key evaluation.generation.{name}; "
        + nearest(str(name), allowed)
        for name in generation
        if name not in allowed
    ]


def _type_fault(hint: Any, value: Any) -> str | None:
    """What `value` should have been, or None where it fits `hint`."""
    plain = typing.get_args(hint) if _is_union(hint) else (hint,)
    checkable = [kind for kind in plain if kind in (bool, int, float, str, types.NoneType, dict, list)]
    if len(checkable) < len(plain):  # enums, nested generics and classes: the class itself will tell
        return None
    if value is None or (isinstance(value, bool) and bool not in checkable):
        fits = types.NoneType in checkable if value is None else False
    else:
        try:
            TypeAdapter(hint).validate_python(value, strict=not isinstance(value, int))
            fits = True
        except ValidationError:
            fits = False
    names = {types.NoneType: "null", str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
    return None if fits else " or ".join(names.get(kind, f"a {kind.__name__}") for kind in checkable)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
