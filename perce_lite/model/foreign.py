"""Adapters of other trainers: a LoRA that peft saved, without metadata of ours."""

from pathlib import Path
from typing import Any

from peft import PeftType
from pydantic import ValidationError

from perce_lite.errors import AdapterError, RecipeError, TemplateError
from perce_lite.model.adapter_files import FOREIGN
from perce_lite.model.base import load_tokenizer
from perce_lite.model.footprint import config_of
from perce_lite.recipe import Recipe, Template
from perce_lite.recipe_checks import pydantic_fault
from perce_lite.recipe_yaml import read_yaml

_CHAT_TEMPLATES = (".jinja", ".j2")


def foreign_metadata(
    folder: Path, config: dict[str, Any], model: str | None, data: Path | None, template: Path | None
) -> dict[str, Any]:
    """Metadata for the adapter in `folder` that peft saved with `config`: of its base nothing but the shape is known.

    The chat template is that of `template`, else of the adapter's own folder, else of the base.

    Raises:
        AdapterError: not a LoRA, or no base is named; TemplateError: no chat template anywhere.
        ModelError: no such base.
    """
    kind = str(config.get("peft_type")).upper()
    if kind != PeftType.LORA.value:
        raise AdapterError(f"{folder}: a LoRA is needed, and this is {kind} by its adapter_config.json")
    name = model or config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{folder}: its adapter_config.json names no base: give --model FOLDER")
    is_chat_template = template is not None and template.suffix in _CHAT_TEMPLATES
    section = Template() if template is None or is_chat_template else _template_section(template)
    fields: dict[str, Any] = {"model": str(name), "data": {"path": None if data is None else str(data.absolute())}}
    recipe = Recipe.model_validate({**fields, "template": section.model_dump()})
    shape = config_of(recipe).get_text_config()
    return {
        FOREIGN: True,
        "run": FOREIGN,
        "folder": str(folder),
        "recipe": recipe.model_dump(mode="json"),
        "recipe_fingerprint": recipe.fingerprint(),
        "base": {
            "shape": [
                shape.model_type,
                shape.num_hidden_layers,
                shape.hidden_size,
                shape.vocab_size,
                shape.tie_word_embeddings,
            ],
            "fingerprint": "",
        },
        "train_on": "counterfactual",  # whether it was trained with profiles nobody says: none is asked for
        "estimator": "uniform",
        "data": {"rows": 0, "users": 0, "fingerprint": ""},
        "metrics": {"losses": [], "weights": {}},
        "versions": {},
        "chat_template": _chat_template(folder, recipe, template if is_chat_template else None),
    }


def _chat_template(folder: Path, recipe: Recipe, file: Path | None) -> str:
    own = folder / "chat_template.jinja"
    if file is None and own.is_file():
        file = own
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"--template {file}: cannot be read: {error}") from error
    of_base = load_tokenizer(recipe).chat_template
    if not isinstance(of_base, str):
        raise TemplateError(
            f"{folder}: this adapter of another trainer has no chat template, nor has its base {recipe.model}. Give "
            "the one that it was trained with: --template FILE.jinja"
        )
    return of_base


def _template_section(file: Path) -> Template:
    """The keys of a recipe's `template:` in a YAML file of their own; raises TemplateError, RecipeError."""
    if not file.is_file():
        raise TemplateError(f"--template {file}: there is no such file; give a chat template (.jinja) or a YAML file")
    plain, lines = read_yaml(file)
    try:
        return Template.model_validate(plain)
    except ValidationError as error:
        raise RecipeError(str(file), [pydantic_fault(fault, Template, lines) for fault in error.errors()]) from error
