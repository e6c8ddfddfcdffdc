"""Options that several commands share, and what they mean."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from perce_lite.console import say
from perce_lite.data.readers import require_data, user_texts
from perce_lite.errors import PerceLiteError, RecipeError
from perce_lite.files import json_text, refuse_unwritable
from perce_lite.locks import write_alone
from perce_lite.model.adapter_files import recipe_of
from perce_lite.recipe import Recipe, load_recipe
from perce_lite.recipe_checks import tracker_faults


def writable(path: Path | None) -> Path | None:
    """`path`, which can be written: asked before any work. - is standard output."""
    if path is not None and str(path) != "-":
        refuse_unwritable(path, "Give another file.")
    return path


RecipePath = Annotated[Path, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set train.learning_rate=1e-4.")]
FleetPath = Annotated[
    Path | None, typer.Option("--fleet", file_okay=False, help="The fleet's folder; else the only one under runs/.")
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        dir_okay=False,
        callback=writable,
        help="Write the figures to this file as well; - is standard output.",
    ),
]
PagePath = Annotated[
    Path | None,
    typer.Option("--out", dir_okay=False, callback=writable, help="The page; else one in <output_dir>."),
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


def readable_recipe(path: Path, overrides: Sequence[str] | None, rows: bool = True) -> Recipe:
    """The recipe at `path`, whose rows and base are there as far as that can be told without torch.

    rows: whether the command needs them

    Raises:
        RecipeError: as `load_recipe`, or `model` is a path to nothing; DataError: no such file, or no record in it.
    """
    recipe = load_recipe(path, overrides or [])
    if not recipe.model_is_there():
        raise RecipeError(str(path), [f"model: {recipe.model}: there is no such folder, here or beside the recipe"])
    if rows:
        require_data(recipe)
    return recipe


def open_recipe(path: Path, overrides: Sequence[str] | None, trains: bool = False) -> Recipe:
    """The recipe of a command that writes into `train.output_dir`; what can be refused without torch is refused.

    trains: it also needs the packages that `train.report_to` names

    Raises:
        RecipeError: a tracker that is absent; PathError: nothing can be written to the output folder; and as
        `readable_recipe`.
    """
    recipe = readable_recipe(path, overrides)
    faults = tracker_faults(recipe.train.get("report_to")) if trains else []
    if faults:
        raise RecipeError(str(path), [f"train.{fault}" for fault in faults])
    refuse_unwritable(recipe.output_dir, "Take another folder with --set train.output_dir=FOLDER.", folder=True)
    return recipe


def say_loading(metadata: dict[str, Any]) -> None:
    """Says what takes its time from here on: torch, then the base, then the adapter."""
    say(f"Loading {recipe_of(metadata).model} and the adapter {metadata['folder']} ...")


def require_user(metadata: dict[str, Any], user: str | None) -> None:
    """Raises DataError where the data of an adapter with these metadata know no such `user`."""
    if user is not None:
        user_texts(recipe_of(metadata), user)


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes what `--json` asks for."""
    if path is None:
        return
    if str(path) == "-":
        sys.stdout.write(json_text(figures))
    else:
        write_alone(path, json_text(figures))


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
