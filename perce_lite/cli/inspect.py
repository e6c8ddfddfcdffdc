"""The command `perce-lite inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, PagePath, RecipePath, Set, open_recipe, writable, write
from perce_lite.cli.views import picture, terminal
from perce_lite.data.readers import user_texts
from perce_lite.fleet import queries
from perce_lite.model.adapter_files import read_metadata

device = Lazy("perce_lite.device")
inspection = Lazy("perce_lite.evaluation.inspect")
oom_advice = Lazy("perce_lite.planning.oom_advice")
pages = Lazy("perce_lite.cli.views.page")


def inspect(
    recipe: RecipePath,
    adapter: Annotated[Path | None, typer.Option(help="Look with this adapter on.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows at the most, spread over users.")] = 48,
    user: Annotated[str | None, typer.Option(help="Rows of this user only.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Most personal words and rows to list.")] = 20,
    out: PagePath = None,
    image: Annotated[
        Path | None,
        typer.Option(dir_okay=False, callback=writable, help="Draw the most personal response into this SVG."),
    ] = None,
    set_: Set = None,
    json: Json = None,
) -> None:
    """Look at what PerContrast finds in the data, token by token, before any training."""
    loaded = open_recipe(recipe, set_)
    for place in (loaded.output_dir, *([adapter] if adapter is not None else [])):
        queries.refuse_deleted(place, user)
    if adapter is not None:
        read_metadata(adapter)
    if user is not None:
        user_texts(loaded, user)
    device.say_device(loaded)
    with oom_advice.explain_out_of_memory_in_scoring(loaded):
        figures = inspection.inspect(loaded, adapter, rows, user, top)
    page = out or loaded.output_dir / "inspect.html"
    pages.write_inspection(figures, page)
    if image is not None:
        picture.write_picture(figures, image)
    write(json, figures)
    terminal.show_inspection(figures, page)
