"""Any text as a recipe, any override: a recipe or one clear error, never another exception."""

import io
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from perce_lite.errors import RecipeError
from perce_lite.recipe import Recipe, load_recipe, lora_config, training_config

KEYS = [
    *Recipe.model_fields,
    "data.path",
    "profile.top_k",
    "train.learning_rate",
    "lora.r",
    "split.by",
    "ünknown",
    "train",
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
text = st.text(st.characters(codec="utf-8"), max_size=80)


def outcome(raw: bytes, overrides: list[str]) -> Recipe | str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.yaml"
        path.write_bytes(raw)
        try:
            recipe = load_recipe(path, overrides)
            training_config(recipe)
            lora_config(recipe)
        except RecipeError as error:
            return str(error) if error.faults and all(fault.strip() for fault in error.faults) else ""
        return recipe


@settings(max_examples=150, deadline=None, derandomize=True)
@given(raw=text.map(str.encode) | st.binary(max_size=60), override=text)
def test_any_text_is_a_recipe_or_an_error(raw, override):
    assert outcome(raw, [])
    assert outcome(b"data: {path: rows.jsonl}\n", [override])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(key=st.sampled_from(KEYS), value=values)
def test_any_value_of_any_key_is_a_recipe_or_an_error_that_names_the_key(key, value):
    dumped = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = True, 10**6
    yaml.dump([value], dumped)
    written = dumped.getvalue().strip()
    found = outcome(b"data: {path: rows.jsonl}\n", [f"{key}={written[1:-1]}"])
    assert isinstance(found, Recipe) or key.split(".")[0] in found
