"""The command `perce-lite train`."""

from functools import partial
from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, RecipePath, Set, open_recipe, write
from perce_lite.cli.views import terminal, train_sections
from perce_lite.console import console

device = Lazy("perce_lite.device")
oom_advice = Lazy("perce_lite.planning.oom_advice")
pages = Lazy("perce_lite.cli.views.page")
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
    page = loaded.output_dir / "train.html"
    lead = f"{recipe}, {loaded.model}."
    pages.write_figures(
        "Training",
        lead,
        train_sections.training_sentences(figures),
        train_sections.training(figures),
        page,
        train_sections.sample_answers(figures),
    )
    terminal.show_training(figures)
    console.print(f"Page: {page}", style="dim", soft_wrap=True, markup=False)
