"""Options that several commands share, and what they mean."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from perce_lite.errors import PerceLiteError
from perce_lite.files import json_text, write_text

RecipePath = Annotated[Path, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set train.learning_rate=1e-4.")]
FleetPath = Annotated[
    Path | None, typer.Option("--fleet", file_okay=False, help="The fleet's folder; else the only one under runs/.")
]
Json = Annotated[
    Path | None,
    typer.Option("--json", dir_okay=False, help="Write the figures to this file as well; - is standard output."),
]
AdapterPath = Annotated[Path, typer.Argument(help="The folder of an adapter, such as runs/quickstart/adapter.")]
ProfileText = Annotated[str | None, typer.Option("--profile", help="The profile's text, or @FILE.")]
UserName = Annotated[
    str | None, typer.Option("--user", help="A user of the adapter's data: their texts become the profile.")
]
Model = Annotated[
    str | None, typer.Option("--model", help="The adapter's base, where its files name none that is here.")
]
Data = Annotated[
    Path | None,
    typer.Option("--data", dir_okay=False, help="Rows or documents for --user, of an adapter that a script trained."),
]
TemplateFile = Annotated[
    Path | None,
    typer.Option(
        "--template",
        dir_okay=False,
        help="Another trainer's adapter: its chat template (.jinja), or template: (.yaml).",
    ),
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: greedy.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus, with a temperature.")]
Personal = Annotated[
    float, typer.Option(min=0.0, help="How much more like the user: 0.5 adds half of what the profile adds; 0: plain.")
]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes what `--json` asks for."""
    if path is None:
        return
    if str(path) == "-":
        sys.stdout.write(json_text(figures))
    else:
        write_text(path, json_text(figures))


def agreed(question: str, yes: bool, unasked: PerceLiteError) -> bool:
    """Whether to go on: `--yes`, or the answer to `question`. Raises `unasked` where nobody can be asked."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise unasked
    return typer.confirm(question, err=True)


def text_or_file(given: str | None) -> str | None:
    """`given`, or with @FILE what the file holds.

    Raises:
        typer.BadParameter: the file cannot be read.
    """
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"--profile {given}: {error}") from error
