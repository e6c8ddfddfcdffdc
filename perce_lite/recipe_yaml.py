"""YAML 1.2 that remembers where each key stands, so that a fault can name its line."""

import difflib
import typing
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from perce_lite.errors import RecipeError

KeyPath = tuple[str | int, ...]
"""("train", "learning_rate")."""

Lines = dict[KeyPath, str]
"""Where each key stands: "line 12", or "--set train.learning_rate=1e-4"."""

_DEPTH = 20  # far more than a recipe needs: an alias may hold itself


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The YAML as plain data, and where each key stands.

    Raises:
        RecipeError: not UTF-8, not YAML (the line is named), or not a mapping.
    """
    lines: Lines = {}
    yaml = YAML(typ="safe", pure=True)  # pure: YAML 1.2, in which 1e-4 is a number and `no` a word
    try:
        text = path.read_text(encoding="utf-8")
        plain = yaml.load(text)
        _mark(YAML(typ="safe", pure=True).compose(text), (), lines)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        raise RecipeError(str(path), [f"line {mark.line + 1 if mark else '?'}: not YAML: {error.problem}"]) from error
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(str(path), [f"cannot be read as YAML in UTF-8: {' '.join(str(error).split())}"]) from error
    if not isinstance(plain, dict):
        raise RecipeError(str(path), ["a recipe is a mapping such as `model: smollm2-135m`, this is not one"])
    return plain, lines


def _mark(node: Node, at: KeyPath, lines: Lines) -> None:
    if len(at) > _DEPTH:
        raise YAMLError(f"{'.'.join(map(str, at[:3]))} holds itself")
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                continue
            lines[(*at, key.value)] = f"line {key.start_mark.line + 1}"
            _mark(value, (*at, key.value), lines)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = f"line {value.start_mark.line + 1}"
            _mark(value, (*at, index), lines)


def apply_overrides(plain: dict[str, Any], lines: Lines, overrides: typing.Sequence[str]) -> list[str]:
    """Sets each `a.b=value` in place, the value read as YAML; gives the faults of those that cannot be read."""
    faults = []
    for override in overrides:
        key, equals, value = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            faults.append(f"--set {override}: write it as --set train.learning_rate=1e-4")
            continue
        try:
            read = YAML(typ="safe", pure=True).load(value)
        except YAMLError as error:
            faults.append(f"--set {override}: the value is not YAML: {str(error).splitlines()[0]}")
            continue
        section = plain
        for part in parts[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[parts[-1]] = read
        for depth in range(1, len(parts) + 1):
            lines.setdefault(tuple(parts[:depth]), f"--set {override}")
        lines[tuple(parts)] = f"--set {override}"
    return faults


def where(at: KeyPath, lines: Lines) -> str:
    """The prefix "line 12: " for a key, or that of the nearest section around it that stands in the file."""
    for depth in range(len(at), 0, -1):
        if at[:depth] in lines:
            return f"{lines[at[:depth]]}: "
    return ""


def recipes_nearby(path: Path) -> str:
    """What to say of a recipe that is not there."""
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    recipes = sorted(str(other) for other in folder.glob("*.yaml"))
    near = difflib.get_close_matches(str(path), recipes, n=1)
    if near:
        return f"Did you mean {near[0]}?"
    return f"Recipes here: {', '.join(recipes)}" if recipes else "Give the path of a YAML file."
