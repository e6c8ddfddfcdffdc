"""Fields of `PerCEConfig`, `peft.LoraConfig` and transformers' `GenerationConfig`, read from their sources.

Importing them imports torch, for seconds, and a wrong key of a recipe is answered at once. Files and classes are named
here and not in `model.compat`, which imports torch; `tests/test_recipe_fields.py` holds them against the classes
themselves.
"""

import ast
import functools
import importlib.util
import typing
from pathlib import Path
from typing import Any, Literal

from perce_lite.errors import CompatibilityError

Target = Literal["PerCEConfig", "LoraConfig"]

_CLASSES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "PerCEConfig": (
        ("transformers", "training_args.py", "TrainingArguments"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        ("perce_lite", "config.py", "PerCEConfig"),
    ),
    "LoraConfig": (
        ("peft", "config.py", "PeftConfigMixin"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "tuners/lora/config.py", "LoraConfig"),
    ),
}
"""Each class with those that it is derived from, the first of them first: package, file in it, class."""


@functools.cache
def fields_of(target: Target) -> dict[str, Any]:
    """The fields that `target` can be given, with their types; `Any` for a type that only its module knows.

    Raises:
        CompatibilityError: a class does not stand where it stood in the versions that are asked for.
    """
    fields: dict[str, Any] = {}
    for package, file, name in _CLASSES[target]:
        for field in _class(package, file, name).body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                fields.pop(field.target.id, None)
                if _is_given(field):
                    fields[field.target.id] = _hint(field.annotation)
    return fields


@functools.cache
def generation_options() -> frozenset[str]:
    """The options of `GenerationConfig`, which its `__init__` assigns.

    Raises:
        CompatibilityError: as `fields_of`.
    """
    definition = _class("transformers", "generation/configuration_utils.py", "GenerationConfig")
    init = next(node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assigned = [target for node in ast.walk(init) if isinstance(node, ast.Assign) for target in node.targets]
    names = {target.attr for target in assigned if isinstance(target, ast.Attribute)}
    return frozenset(name for name in names if not name.startswith("_"))


def _class(package: str, file: str, name: str) -> ast.ClassDef:
    definitions = [node for node in _parsed(package, file).body if isinstance(node, ast.ClassDef) and node.name == name]
    if not definitions:
        raise CompatibilityError(f"{package}/{file} has no class {name} any more; install the versions asked for.")
    return definitions[0]


def _parsed(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)  # of a top-level package: it is not imported
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / file
    if path is None or not path.is_file():
        raise CompatibilityError(f"{package} has no file {file}: it is absent, or of another version than asked for.")
    return ast.parse(path.read_text("utf-8"))


def _is_given(field: ast.AnnAssign) -> bool:
    """Whether `__init__` takes the field: no ClassVar, no `field(init=False)`."""
    options = field.value.keywords if isinstance(field.value, ast.Call) else []
    made_inside = any(
        option.arg == "init" and isinstance(option.value, ast.Constant) and option.value.value is False
        for option in options
    )
    return not made_inside and "ClassVar" not in ast.unparse(field.annotation)


def _hint(annotation: ast.expr) -> Any:
    """The type that `annotation` names; `Any` where it needs a name that only its module has."""
    try:
        hint = eval(ast.unparse(annotation), {"__builtins__": _KNOWN})
        return eval(hint, {"__builtins__": _KNOWN}) if isinstance(hint, str) else hint
    except (NameError, TypeError, AttributeError, SyntaxError):
        return Any


_KNOWN: dict[str, Any] = {
    **{kind.__name__: kind for kind in (bool, int, float, str, dict, list, tuple, set, type)},
    **{name: getattr(typing, name) for name in ("Any", "Optional", "Union", "Literal")},
}
"""Names that an annotation may use here."""
