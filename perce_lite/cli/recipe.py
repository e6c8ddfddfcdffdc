"""The command `perce-lite recipe`."""

from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy

reference = Lazy("perce_lite.cli.views.reference")


def recipe(
    keys: Annotated[
        bool, typer.Option("--keys", help="Every key of a recipe, and what PerCE Lite makes of TRL's options.")
    ] = False,
) -> None:
    """Print the reference of recipe keys and of TRL's options."""
    if not keys:
        raise typer.BadParameter("give --keys")
    typer.echo(reference.markdown(), nl=False)
