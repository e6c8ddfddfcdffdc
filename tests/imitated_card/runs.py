"""What the tests run on the imitated card: recipes over toys, and steps of an 8B's shape."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import toys

from perce_lite.evaluation.summary import train_and_measure
from perce_lite.recipe import Recipe, load_recipe

_RECIPE = """
model: model
data: {path: rows.jsonl}
lora: {r: 4}
train: {max_steps: 2, max_length: 512, learning_rate: 1e-2}
evaluation: {max_rows: 2, max_new_tokens: 2}
"""


def toy_recipe(
    folder: Path, family: str = "chatml", more: Sequence[str] = (), rows: Sequence[dict[str, Any]] | None = None
) -> Recipe:
    """A recipe over a toy model in `folder`; more: overrides."""
    toys.toy_folder(folder / "model", family)
    lines = toys.toy_rows() if rows is None else rows
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "mine.yaml").write_text(_RECIPE)
    own = [f"train.output_dir={folder / 'out'}", f"train.store={folder / 'store'}"]
    return load_recipe(folder / "mine.yaml", [*own, *more])


def train(recipe: Recipe) -> dict[str, float]:
    """The held-out loss of base and adapter after what `perce-lite train` does."""
    loss = train_and_measure(recipe)["losses"][0]
    return {name: loss[name] for name in ("base", "adapter")}
