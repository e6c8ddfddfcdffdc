"""What the tests run on the imitated card: recipes over toys, and steps of an 8B's shape."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import toys

from perce_lite.evaluation.bench.gpumeasuring import Place
from perce_lite.evaluation.bench.gpureport import recipe_of_report
from perce_lite.evaluation.bench.imitation.libraries import imitated
from perce_lite.evaluation.bench.imitation.step import ENDLESS, Step, step_of
from perce_lite.evaluation.bench.randombase import write_shape
from perce_lite.evaluation.summary import train_and_measure
from perce_lite.planning.shapes import known_config
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


def step_of_shape(
    folder: Path,
    shape: str = "Llama-3.1-8B",
    layers: int = 4,
    lengths: Sequence[int] = (2048,),
    card: dict[str, Any] | None = None,
    hosted: bool = False,
    **train: Any,
) -> Step:
    """A step over a batch of rows of these `lengths`, with a known model's shape cut to `layers` layers.

    card: options of `Card`; hosted: the embedding table on the host; train: fields of `train:`
    """
    config = known_config(shape)
    assert config is not None
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-layers:]
    write_shape(config, folder / "shape")
    recipe = recipe_of_report(folder / "shape", max(lengths))
    own = {"output_dir": str(folder / "out"), "per_device_train_batch_size": len(lengths)}
    recipe = recipe.model_copy(update={"train": {**recipe.train, **own, **train}, "embedding_on_host": hosted})
    rows = [Place(recipe, folder, 2, 0).rows(length, 1, 1)[0] for length in lengths]
    with imitated(shapes=True, memory=ENDLESS, **(card or {})) as gpu:
        return step_of(gpu, recipe, config, rows)
