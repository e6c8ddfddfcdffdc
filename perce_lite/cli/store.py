"""The commands `perce-lite store show` and `store clear`."""

from pathlib import Path
from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, write
from perce_lite.cli.views import terminal
from perce_lite.console import errors
from perce_lite.files import home

store_files = Lazy("perce_lite.model.store_files")

store = typer.Typer(
    help="The log-probs kept between runs.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

StorePath = Annotated[
    Path | None, typer.Option("--path", file_okay=False, help="The store's folder; default: that of the recipes.")
]


@store.command("show")
def show(path: StorePath = None, json: Json = None) -> None:
    """Entries and size, by base."""
    root = path or home() / "store"
    bases = store_files.usage(root)
    write(json, {"store": str(root), "bases": bases})
    terminal.show_store(root, bases)


@store.command("clear")
def clear(path: StorePath = None, json: Json = None) -> None:
    """Remove every entry; the next run scores anew."""
    root = path or home() / "store"
    freed = store_files.clear(root)
    write(json, {"store": str(root), "bytes_freed": freed})
    errors.print(f"Cleared {root}: {freed / 2**20:.2f} MiB freed.")
