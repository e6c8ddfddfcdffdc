"""What a TRL script asks for, read from its text: it is parsed, never run."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perce_lite.errors import DataError
from perce_lite.recipe_checks import third_party_faults

_SECTIONS = {
    **dict.fromkeys(("SFTConfig", "PerCEConfig", "TrainingArguments"), "train"),
    **dict.fromkeys(("LoraConfig", "peft_config"), "lora"),
}
_OURS = ("output_dir", "task_type")
"""Fields that a recipe sets itself."""


@dataclass
class Script:
    """What was read.

    train, lora: fields with values that a recipe takes
    model, path, hub: the base, a file of rows, a data set of the Hub; None where the script names none in words
    left_out: a sentence on each thing that is not taken
    """

    train: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    path: str | None = None
    hub: str | None = None
    left_out: list[str] = field(default_factory=list)


def read_script(path: Path) -> Script:
    """What the TRL script at `path` asks for.

    Raises:
        DataError: it cannot be read, is no Python, or calls nothing of TRL's.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a Python script: {error}") from error
    script, known = Script(), _constants(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        _take(call, script, known)
    names = {_called(call) for call in calls}
    if not names & {"SFTTrainer", "PerCETrainer", "SFTConfig", "PerCEConfig"}:
        raise DataError(f"{path}: no TRL script: it calls neither SFTTrainer nor SFTConfig")
    return script


def _constants(tree: ast.Module) -> dict[str, Any]:
    """The names that a script gives to plain values, such as MODEL = "Qwen/Qwen3-4B"."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            for value in _values(node.value, {}):
                known[node.targets[0].id] = value
    return known


def _values(node: ast.expr, known: dict[str, Any]) -> Iterator[Any]:
    """The plain value of an expression, if it has one."""
    if isinstance(node, ast.Name) and node.id in known:
        yield known[node.id]
        return
    try:
        yield ast.literal_eval(node)
    except ValueError:  # computed
        return


def _called(call: ast.Call) -> str:
    """The name that is called: SFTConfig of trl.SFTConfig(...), from_pretrained of X.from_pretrained(...)."""
    function = call.func
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def _take(call: ast.Call, script: Script, known: dict[str, Any]) -> None:
    name = _called(call)
    given = {word.arg: next(_values(word.value, known), None) for word in call.keywords if word.arg}
    first = next(_values(call.args[0], known), None) if call.args else None
    if name in _SECTIONS:
        _take_fields(_SECTIONS[name], call, script, known)
    elif name in ("SFTTrainer", "PerCETrainer") or (name == "from_pretrained" and "Model" in ast.unparse(call.func)):
        model = given.get("model") or first
        script.model = script.model or (model if isinstance(model, str) else None)
    elif name == "load_dataset":
        files = given.get("data_files")
        if isinstance(files, str):
            script.path = script.path or files
        elif isinstance(first, str) and files is None:
            script.hub = script.hub or first
        else:
            script.left_out.append(f"line {call.lineno}: which data load_dataset reads is computed; set data.path")


def _take_fields(section: str, call: ast.Call, script: Script, known: dict[str, Any]) -> None:
    """The fields of a configuration that a recipe takes as well."""
    fields: dict[str, Any] = {"train": script.train, "lora": script.lora}[section]
    for word in call.keywords:
        where = f"line {word.value.lineno}: {word.arg}"
        value = next(_values(word.value, known), None)
        if word.arg in _OURS:
            continue
        if word.arg is None or (value is None and not isinstance(word.value, ast.Constant)):
            script.left_out.append(f"{where}: its value is computed; set {section}.{word.arg}")
        elif faults := third_party_faults({section: {word.arg: value}}, {}):
            script.left_out.append(f"{where}: {faults[0]}")
        else:
            fields[word.arg] = list(value) if isinstance(value, tuple) else value
