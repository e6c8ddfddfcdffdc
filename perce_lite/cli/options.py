"""Options that several commands of the command line share."""

from pathlib import Path
from typing import Annotated, Any

import typer

RecipePath = Annotated[Path, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set train.learning_rate=1e-4.")]
FleetPath = Annotated[
    Path | None, typer.Option("--fleet", file_okay=False, help="The fleet's folder; else the only one under runs/.")
]
Json = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write the figures to this file as well.")]


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes what `--json` asks for."""
    if path is not None:
        from perce_lite.files import write_json

        write_json(path, figures)
