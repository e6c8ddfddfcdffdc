"""The command `perce-lite train`."""

from functools import partial
from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, RecipePath, Set, open_recipe, write
from perce_lite.cli.views import terminal

device = Lazy("perce_lite.device")
oom_advice = Lazy("perce_lite.planning.oom_advice")
run = Lazy("perce_lite.training.run")
summary = Lazy("perce_lite.evaluation.summary")


def train(
    recipe: RecipePath,
    set_: Set = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an earlier run in the same folder away.")] = False,
    json: Json = None,
) -> None:
    """Train the recipe's adapter, or resume an earlier run of it."""
    loaded = open_recipe(recipe, set_, trains=True)
    device.say_device(loaded)
    with oom_advice.explain_out_of_memory(loaded, partial(run.newest_checkpoint, loaded.output_dir)):
        figures = summary.train_and_measure(loaded, restart)
    write(json, figures)
    terminal.show_training(figures)
