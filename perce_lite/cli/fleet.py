"""The commands of a fleet: `perce-lite fleet` and `perce-lite adapters`. Heavy modules are imported inside them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from perce_lite.cli.options import FleetPath, Json, RecipePath, Set, write

adapters_app = typer.Typer(help="The adapters of a fleet.", no_args_is_help=True)


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
    """Train an adapter for every user (or cohort) who is due, over one base. Goes on where it was."""
    from perce_lite.recipe import load_recipe

    read = load_recipe(recipe, set_ or [])
    from perce_lite.cli.views import sections
    from perce_lite.cli.views import terminal as tables
    from perce_lite.cli.views.page import write_figures
    from perce_lite.fleet.engines.slots import engine_for
    from perce_lite.fleet.fleet import PAGE
    from perce_lite.fleet.fleet import fleet as run

    figures = run(read, engine_for, only or [], retrain or [], dry_run)
    book = figures.pop("book")
    write(json, figures)
    page = None if dry_run else read.output_dir / PAGE
    if page is not None:
        told = sections.fleet_sentences(figures, book)
        write_figures("A fleet of adapters", f"{recipe}, {read.model}.", told, sections.fleet(book), page)
    tables.show_fleet(figures, page)
    if figures["failed"]:
        raise typer.Exit(3)


@adapters_app.command("list")
def adapters_list(fleet: FleetPath = None, json: Json = None) -> None:
    """Every adapter of a fleet: state, training rows, gain, size."""
    from perce_lite.cli.views import sections
    from perce_lite.cli.views import terminal as tables
    from perce_lite.fleet.queries import find
    from perce_lite.fleet.registry import opened

    with opened(find(fleet)) as registry:
        book = registry.all()
    write(json, {"adapters": [{"state": one.state, **vars(one)} for one in book]})
    for section in sections.fleet(book):
        tables.show_book(section)


@adapters_app.command("show")
def adapters_show(
    name: Annotated[str, typer.Argument(help="A user, cohort:NAME, or all.")],
    fleet: FleetPath = None,
    json: Json = None,
) -> None:
    """All that the book says of one adapter: lineage, figures, state."""
    from perce_lite.fleet.queries import show

    _answer(show, name, fleet, json)


@adapters_app.command("who")
def adapters_who(
    user: Annotated[str, typer.Argument(help="A user.")], fleet: FleetPath = None, json: Json = None
) -> None:
    """Which adapter serves a user, and why that one."""
    from perce_lite.fleet.queries import who

    _answer(who, user, fleet, json)


def _answer(ask: Callable[[Any, str], dict[str, Any]], name: str, fleet: Path | None, json: Path | None) -> None:
    """What `ask` says of `name`, from the book of `fleet`."""
    from perce_lite.cli.views import terminal as tables
    from perce_lite.fleet.queries import find
    from perce_lite.fleet.registry import opened

    with opened(find(fleet)) as registry:
        figures = ask(registry, name)
    write(json, figures)
    tables.show_facts(figures)


@adapters_app.command("verify")
def adapters_verify(fleet: FleetPath = None, json: Json = None) -> None:
    """Whether every adapter that was trained is there and whole."""
    from perce_lite.console import console
    from perce_lite.fleet.queries import find, verify
    from perce_lite.fleet.registry import opened

    with opened(find(fleet)) as registry:
        faults, trained = verify(registry), sum(one.trained_run is not None for one in registry.all())
    write(json, {"faults": faults, "trained": trained})
    for fault in faults:
        console.print(fault, markup=False, style="red")
    console.print(f"{trained - len(faults)} of {trained} adapters are whole.")
    if faults:
        raise typer.Exit(2)


@adapters_app.command("delete")
def adapters_delete(
    user: Annotated[str, typer.Argument(help="A user.")], fleet: FleetPath = None, json: Json = None
) -> None:
    """Remove all that was written of a user, and print a receipt."""
    from dataclasses import asdict

    from perce_lite.cli.views import terminal as tables
    from perce_lite.fleet.queries import delete, find

    receipt = delete(find(fleet), user)
    write(json, asdict(receipt))
    tables.show_facts(asdict(receipt))
