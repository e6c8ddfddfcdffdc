"""The command `perce-lite fleet`."""

from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, RecipePath, Set, open_recipe, write
from perce_lite.cli.views import sections, terminal
from perce_lite.data.readers import texts_of_users
from perce_lite.fleet import queries
from perce_lite.fleet.engines.protocol import EngineName

device = Lazy("perce_lite.device")
clusters = Lazy("perce_lite.fleet.engines.ray")
fleets = Lazy("perce_lite.fleet.fleet")
fleet_results = Lazy("perce_lite.fleet.results")
pages = Lazy("perce_lite.cli.views.page")


def fleet(
    recipe: RecipePath,
    only: Annotated[list[str] | None, typer.Option(help="Train this user alone; once for each.")] = None,
    retrain: Annotated[
        list[str] | None, typer.Option(help="Train this user, cohort:NAME or all again, though nothing has changed.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is due; train nothing.")] = False,
    engine: Annotated[
        EngineName, typer.Option(help="local: this process; ray: the workers of a Ray cluster, one a GPU.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="With --engine ray: host:port of the cluster, or auto; else RAY_ADDRESS, or here."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --engine ray: how many; else one for each GPU, or --cores.")
    ] = None,
    cores: Annotated[
        int | None, typer.Option(min=1, help="With --engine ray: CPU cores of a worker, and its threads.")
    ] = None,
    set_: Set = None,
    json: Json = None,
) -> None:
    """Train an adapter for every user (or cohort) who is due, over one base, or resume."""
    for name, given in {"--address": address, "--workers": workers, "--cores": cores}.items():
        if given is not None and engine == "local":
            raise typer.BadParameter(f"{name} goes with --engine ray")
    loaded = open_recipe(recipe, set_, trains=True)
    for user in only or []:
        queries.refuse_deleted(loaded.output_dir, user)
    if only:
        texts_of_users(loaded, only)
    if engine == "local":
        device.say_device(loaded)
    with fleet_results.engines(engine, clusters.RayOptions(address, workers, cores)) as make:
        result = fleets.fleet(loaded, make, only or [], retrain or [], dry_run)
    write(json, result.figures())
    page = None if dry_run else loaded.output_dir / fleets.PAGE
    if page is not None:
        sentences = sections.fleet_sentences(result)
        lead = f"{recipe}, {loaded.model}."
        pages.write_figures("A fleet of adapters", lead, sentences, sections.fleet(result.adapters), page)
    terminal.show_fleet(result, page)
    if result.failed:
        raise typer.Exit(3)
