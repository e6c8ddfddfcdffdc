"""The command `perce-lite weights`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, RecipePath, Set, readable_recipe, writable, write
from perce_lite.console import console

device = Lazy("perce_lite.device")
oom_advice = Lazy("perce_lite.planning.oom_advice")
writing = Lazy("perce_lite.training.weights")


def weights(
    recipe: RecipePath,
    to: Annotated[Literal["jsonl", "parquet"], typer.Option(help="The file's format.")] = "jsonl",
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Else <output_dir>/weights.FORMAT.")] = None,
    set_: Set = None,
    json: Json = None,
) -> None:
    """Write token ids, labels, PIR and weights of every row, for other trainers."""
    loaded = readable_recipe(recipe, set_)
    file = out or loaded.output_dir / f"weights.{to}"
    writable(file)
    device.say_device(loaded)
    with oom_advice.explain_out_of_memory_in_scoring(loaded):
        figures = writing.write_weights(loaded, to, file)
    write(json, figures)
    statistics = figures["weights"]
    rows = ", ".join(f"{count} {split}" for split, count in figures["rows"].items() if count)
    console.print(f"Rows: {rows}; {figures['tokens']} tokens with loss", markup=False)
    for left_out in figures["left_out"]["dropped"]:
        told_of = f"Left out: {left_out['rows']} of user {left_out['user']}, {left_out['reason']}"
        console.print(f"{told_of}, such as {left_out['such_as']}", markup=False, soft_wrap=True)
    console.print(
        f"Weight {figures['weighting']}: mean {statistics['weight_mean']:.3f}, "
        f"{statistics['share_above_min']:.0%} above the least",
        markup=False,
    )
    console.print(f"Weights: {figures['file']}", markup=False, soft_wrap=True)
