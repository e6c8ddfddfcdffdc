"""The commands `perce-lite adapters list`, `show`, `who`, `verify` and `delete`."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from perce_lite.cli.options import FleetPath, Json, agreed, write
from perce_lite.cli.views import sections, terminal
from perce_lite.console import console
from perce_lite.errors import FleetError
from perce_lite.fleet import queries
from perce_lite.fleet.registry import Registry, opened
from perce_lite.words import counted

adapters = typer.Typer(
    help="The adapters of a fleet.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@adapters.command("list")
def list_(fleet: FleetPath = None, json: Json = None) -> None:
    """Every adapter of a fleet: state, training rows, gain, size."""
    with opened(queries.find(fleet)) as registry:
        entries = registry.all()
    if json is not None:
        write(json, {"adapters": [{"state": entry.state, **vars(entry)} for entry in entries]})
    for section in sections.fleet(entries):
        terminal.show_registry(section)


@adapters.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A user, cohort:NAME, or all.")],
    fleet: FleetPath = None,
    json: Json = None,
) -> None:
    """All that the registry holds of one adapter: lineage, figures, state."""
    _answer(queries.show, name, fleet, json)


@adapters.command("who")
def who(user: Annotated[str, typer.Argument(help="A user.")], fleet: FleetPath = None, json: Json = None) -> None:
    """Which adapter serves a user, and why that one."""
    _answer(queries.who, user, fleet, json)


def _answer(
    ask: Callable[[Registry, str], queries.Serving | queries.AdapterFacts],
    name: str,
    fleet: Path | None,
    json: Path | None,
) -> None:
    """Shows what `ask` answers about `name`, from the registry of `fleet`."""
    with opened(queries.find(fleet)) as registry:
        facts = ask(registry, name).figures()
    write(json, facts)
    terminal.show_facts(facts)


@adapters.command("verify")
def verify(fleet: FleetPath = None, json: Json = None) -> None:
    """Whether every adapter that was trained is there and whole."""
    with opened(queries.find(fleet)) as registry:
        faults = queries.verify(registry)
        trained = sum(entry.trained_run is not None for entry in registry.all())
    write(json, {"faults": faults, "trained": trained})
    for fault in faults:
        console.print(fault, markup=False, style="red")
    console.print(f"{trained - len(faults)} of {counted(trained, 'adapter is whole', 'adapters are whole')}.")
    if faults:
        raise typer.Exit(2)


@adapters.command("delete")
def delete(
    user: Annotated[str, typer.Argument(help="A user.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the receipt in advance; remove nothing.")] = False,
    fleet: FleetPath = None,
    json: Json = None,
) -> None:
    """Remove all that was written of a user, and print a receipt."""
    folder = queries.find(fleet)
    receipt = queries.delete(folder, user, dry_run=True)
    if not dry_run:
        words = ["perce-lite", "adapters", "delete", user, "--fleet", str(folder)]
        unasked = f"Nothing was removed: nobody can be asked here. To delete {user}: {shlex.join([*words, '--yes'])}"
        if not yes and sys.stdin.isatty():
            terminal.show_facts(asdict(receipt))
        if not agreed(f"Remove this for good, and leave {user} out of later runs?", yes, FleetError(unasked)):
            raise FleetError("Nothing was removed.")
        receipt = queries.delete(folder, user)
    figures = {"dry_run": dry_run, **asdict(receipt)}
    write(json, figures)
    terminal.show_facts(figures)
