"""The reference of recipe keys and of TRL's options as Markdown: `perce-lite recipe --keys`, kept as RECIPE.md."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo
from trl import SFTConfig

from perce_lite.choices import CHOICES
from perce_lite.config import VERDICTS, PerCEConfig
from perce_lite.recipe import Recipe, Section, train_defaults

_INTRO = """\
# Recipe reference

Printed by `perce-lite recipe --keys`; a test keeps this file the same. A recipe is YAML 1.2. Only `data` is required.
`--set section.key=value` overrides a key on the command line. An unknown key, a value of another type and a combination
that cannot be trained are refused together, each with its line.

"""

_TRAIN = """
## train

The fields of `PerCEConfig`: all of TRL's `SFTConfig`, under their own names, and these:
"""

_TRAIN_DEFAULTS = """
A recipe starts from these values where they differ from TRL's own:
"""

_LORA = """
## lora

The fields of `peft.LoraConfig`, under their own names. A recipe starts from `r: 16`, `lora_alpha: 32`,
`target_modules: all-linear`. One key is ours: `core_only: true` freezes A and B of the adapter that training starts
from and trains an r x r core between them (LoRA-XS style, arXiv 2405.17604); it is for `perce-lite fleet`.
"""

_VERDICTS = """
## TRL's options

What becomes of the options of `SFTConfig` and `SFTTrainer` that touch the loss, the data or the batch. Every option
that is not in this table works as in TRL.
"""


def markdown() -> str:
    """The whole reference; ends with a line break."""
    sections = {name: field for name, field in Recipe.model_fields.items() if _section(field) is not None}
    top = [name for name in Recipe.model_fields if name not in sections and name not in ("lora", "train")]
    parts = [_INTRO, _table("key", (_key_row(name, Recipe.model_fields[name]) for name in top))]
    for name, field in sections.items():
        section = _section(field)
        assert section is not None
        lead = (section.__doc__ or "").strip()
        rows = (_key_row(f"{name}.{key}", value) for key, value in section.model_fields.items())
        parts.append(f"\n## {name}\n\n{lead}\n\n{_table('key', rows)}")
    ours = [field for field in dataclasses.fields(PerCEConfig) if field.name not in _fields_of_trl()]
    parts += [_TRAIN, "\n", _table("key", (_train_row(field) for field in ours))]
    parts += [_TRAIN_DEFAULTS, "\n", _defaults_table(), _LORA, _VERDICTS, "\n"]
    verdicts = ((f"`{name}`", verdict.says, verdict.reason) for name, verdict in VERDICTS.items())
    parts.append(_rows(("option", "verdict", "reason"), verdicts))
    return "".join(parts)


def _section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _fields_of_trl() -> set[str]:
    return {field.name for field in dataclasses.fields(SFTConfig)}


def _table(head: str, rows: Iterator[tuple[str, str, str, str]]) -> str:
    return _rows((head, "type", "default", "meaning"), rows)


def _rows(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cells).replace("\n", " ") + " |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines) + "\n"


def _key_row(name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
    return f"`{name}`", _type(field.annotation), default, _cell(field.description or "")


def _train_row(field: "dataclasses.Field[Any]") -> tuple[str, str, str, str]:
    kind = typing.get_type_hints(PerCEConfig)[field.name]
    words = " or ".join(f"`{word}`" for word in typing.get_args(CHOICES[field.name])) if field.name in CHOICES else ""
    return f"`train.{field.name}`", words or _type(kind), f"`{_yaml(field.default)}`", _cell(field.metadata["help"])


def _defaults_table() -> str:
    gpu, cpu = train_defaults(on_cpu=False), train_defaults(on_cpu=True)
    names = [name for name in gpu if name != "store"]
    rows = ((f"`train.{name}`", f"`{_yaml(gpu[name])}`", f"`{_yaml(cpu[name])}`") for name in names)
    return _rows(("key", "on a GPU", "on a CPU"), rows)


_TYPES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
    dict: "mapping",
    list: "list",
}


def _type(kind: Any) -> str:
    """The type of a key, in the words of YAML."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is typing.Literal:
        return " or ".join(f"`{word}`" for word in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in inner)
    if origin is list:
        return f"list of {_type(inner[0])}" if inner else "list"
    return _TYPES.get(origin or kind, getattr(kind, "__name__", str(kind)))


def _yaml(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(inner) for inner in value) + "]"
    return str(value).replace("\n", "\\n") if not isinstance(value, str) else repr(value)[1:-1] or '""'


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
