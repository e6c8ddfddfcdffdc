"""The command `perce-lite plan`. Heavy modules are imported inside it."""

from typing import Annotated, Any

import typer

from perce_lite.cli.options import Json, RecipePath, Set, write

_FOR_CARDS = ("activation_offloading", "bf16", "fp16", "tf32")
"""Fields of `train:` that a machine without a GPU refuses."""


def plan(
    recipe: RecipePath,
    gpu: Annotated[
        list[str] | None, typer.Option(help='A card, such as 8GB or "RTX 4070"; once for each. Else the one here.')
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Run one real step on the card here and compare.")] = False,
    set_: Set = None,
    json: Json = None,
) -> None:
    """Say whether the recipe fits a card, what takes the memory and what to change. Loads no weights."""
    from perce_lite.planning.gpus import card
    from perce_lite.recipe import load_recipe, training_config

    if probe and gpu:
        raise typer.BadParameter("--probe measures the card of this machine; leave --gpu out")
    named = [card(one) for one in gpu or []]
    read = load_recipe(recipe, set_ or [])
    from perce_lite.cli.views import plan as plantable
    from perce_lite.planning.gpus import COMMON_SIZES, of_size, present
    from perce_lite.planning.plan import figures

    if probe:
        from perce_lite.planning.probe import probe as run

        measured = run(read)
        write(json, measured)
        plantable.show_probe(measured)
        return
    here = present()
    cards = named or ([here] if here is not None else [of_size(size) for size in COMMON_SIZES])
    # What a trainer refuses is refused here, less what needs a card, which this machine may not have.
    plain = {name: value for name, value in read.train.items() if name not in _FOR_CARDS}
    training_config(read.model_copy(update={"train": plain}), bf16=False, fp16=False)
    told: dict[str, Any] = figures(read, cards)
    write(json, told)
    plantable.show_plan(told, str(recipe), set_ or [])
