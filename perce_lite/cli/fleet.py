"""The command `perce-lite fleet`."""

from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, RecipePath, Set, open_recipe, write
from perce_lite.cli.views import sections, terminal
from perce_lite.data.readers import user_texts
from perce_lite.fleet import queries

device = Lazy("perce_lite.device")
engines = Lazy("perce_lite.fleet.engines.slots")
fleets = Lazy("perce_lite.fleet.fleet")
pages = Lazy("perce_lite.cli.views.page")


def fleet(
    recipe: RecipePath,
    only: Annotated[list[str] | None, typer.Option(help="Train this user alone; once for each.")] = None,
    retrain: Annotated[
        list[str] | None, typer.Option(help="Train this user, cohort:NAME or all again, though nothing has changed.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is due; train nothing.")] = False,
    set_: Set = None,
    json: Json = None,
) -> None:
    """Train an adapter for every user (or cohort) who is due, over one base, or resume."""
    loaded = open_recipe(recipe, set_, trains=True)
    for user in only or []:
        queries.refuse_deleted(loaded.output_dir, user)
        user_texts(loaded, user)
    device.say_device(loaded)
    result = fleets.fleet(loaded, engines.engine_for, only or [], retrain or [], dry_run)
    write(json, result.figures())
    page = None if dry_run else loaded.output_dir / fleets.PAGE
    if page is not None:
        sentences = sections.fleet_sentences(result)
        lead = f"{recipe}, {loaded.model}."
        pages.write_figures("A fleet of adapters", lead, sentences, sections.fleet(result.adapters), page)
    terminal.show_fleet(result, page)
    if result.failed:
        raise typer.Exit(3)
