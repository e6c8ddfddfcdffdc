"""The command `perce-lite init`."""

import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, write
from perce_lite.console import console, warn
from perce_lite.errors import RecipeError
from perce_lite.locks import write_alone
from perce_lite.recipe import load_recipe

drafting = Lazy("perce_lite.planning.drafting")
gpus = Lazy("perce_lite.planning.gpus")
readers = Lazy("perce_lite.data.readers")
trl_script = Lazy("perce_lite.planning.trl_script")

_HAVE = {
    "writing": "a folder, a ZIP or a file of somebody's writing: notes, mails, chats",
    "rows": "rows, dialogues or documents by author, as JSONL, JSON or parquet",
    "lamp": "the folder of a LaMP task",
    "trl": "a TRL script",
}
_WANT = {"chat": "to chat with one adapter", "fleet": "an adapter for every user", "ollama": "to take it to Ollama"}


def init(
    out: Annotated[Path, typer.Argument(dir_okay=False, help="The recipe to write.")] = Path("recipe.yaml"),
    have: Annotated[str | None, typer.Option(help="What you have: writing, rows, lamp or trl.")] = None,
    data: Annotated[Path | None, typer.Option(help="Where it lies.")] = None,
    gpu: Annotated[str | None, typer.Option(help='8GB, "RTX 4070" or cpu; else the one here.')] = None,
    want: Annotated[str | None, typer.Option(help="What you want: chat, fleet or ollama.")] = None,
    model: Annotated[str | None, typer.Option(help="The base; else the largest that fits the GPU.")] = None,
    user: Annotated[str, typer.Option(help="What to call the person whose writing it is.")] = "me",
    force: Annotated[bool, typer.Option("--force", help="Replace the recipe that is there.")] = False,
    json: Json = None,
) -> None:
    """Ask what you have and want, and write a commented recipe for it; without a terminal, flags say it."""
    if out.exists() and not force:
        raise RecipeError(str(out), ["is there already. Give another name, or replace it with --force."])
    have = _answer("--have", have, "What do you have?", _HAVE)
    data = _place(data, have)
    want = _answer("--want", want, "What do you want?", _WANT)
    draft = _draft(have, data, want, _gpu(gpu), model, out)
    chosen = drafting.choose(draft)
    text = drafting.recipe_text(draft, chosen, out)
    users = _tried(text, out)
    write_alone(out, text)
    commands = _import(have, data, user) + drafting.commands(draft, out, users[0] if users else user)
    for note in draft.notes:
        warn(note)
    write(json, {"recipe": str(out), "model": chosen.model, "bytes": chosen.bytes, "commands": commands})
    console.print(f"Written: {out}, for {chosen.model}. Go on with:", markup=False)
    for command in commands:
        console.print(command, markup=False, soft_wrap=True)


def _answer(flag: str, given: str | None, question: str, choices: Mapping[str, str]) -> str:
    """What a flag says; else what is answered to a question.

    Raises:
        typer.BadParameter: none of the choices; or no flag, and nobody who can be asked.
    """
    listing = ", ".join(f"{name} ({what})" for name, what in choices.items())
    if given is None and not sys.stdin.isatty():
        raise typer.BadParameter(f"{flag} is missing, and there is no terminal to ask on; one of {listing}")
    if given is None:
        for name, what in choices.items():
            console.print(f"  {name}: {what}", markup=False)
    while given is None:
        answer = typer.prompt(question, err=True).strip()
        given = answer if answer in choices else None
    if given not in choices:
        raise typer.BadParameter(f"{flag} {given}: is not one of {listing}")
    return given


def _place(given: Path | None, have: str) -> Path:
    """Where the data lies.

    Raises:
        typer.BadParameter: nothing is there; or no flag, and nobody who can be asked.
    """
    if given is None and not sys.stdin.isatty():
        raise typer.BadParameter(f"--data is missing: where is it, {_HAVE[have]}?")
    path = Path(typer.prompt("Where is it?", err=True)) if given is None else given
    if not path.expanduser().exists():
        raise typer.BadParameter(f"--data {path}: there is no such file or folder")
    return path.expanduser()


def _gpu(given: str | None) -> Any:
    """The GPU that is named, else the one here; None: a CPU.

    Raises:
        PlanError: no such GPU.
    """
    if given is None and sys.stdin.isatty():
        here = gpus.present()
        given = typer.prompt("Which GPU (8GB, RTX 4070, cpu)?", default="cpu" if here is None else here.name, err=True)
    if given is None:
        return gpus.present()
    return None if given.strip().lower() in ("cpu", "none") else gpus.gpu(given)


def _draft(have: str, data: Path, want: str, gpu: Any, model: str | None, out: Path) -> Any:
    """All that was said, with what a script asks for."""
    if have == "trl":
        script = trl_script.read_script(data)
        path = data.parent / script.path if script.path and not Path(script.path).exists() else script.path
        section = {"hub": _yaml(script.hub)} if script.hub else {"path": _from(out, Path(path or "rows.jsonl"))}
        notes = [f"Not taken of {data}, {sentence}" for sentence in script.left_out]
        return drafting.Draft(have, want, gpu, section, model or script.model, script.train, script.lora, notes)
    if have == "writing":
        texts = Path("texts.jsonl")
        return drafting.Draft(have, want, gpu, {"path": _from(out, texts), "format": "documents"}, model)
    section = {"path": _from(out, data)} | ({"format": "lamp"} if have == "lamp" else {})
    return drafting.Draft(have, want, gpu, section, model)


def _from(out: Path, data: Path) -> str:
    """A path as a recipe at `out` names it: from its own folder on where it lies below, else absolute."""
    relative = Path(os.path.relpath(data.absolute(), out.absolute().parent))
    return _yaml(str(data.absolute()) if ".." in relative.parts else relative.as_posix())


def _yaml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _tried(text: str, out: Path) -> list[str]:
    """The users in the recipe's data, where it is there; so that a recipe is written only if it can be read.

    Raises:
        RecipeError, DataError: the recipe, or the data that it names, is not what it should be.
    """
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".init-", dir=out.absolute().parent) as scratch:
        aside = Path(scratch).with_suffix(".yaml")
        try:
            aside.write_text(text, encoding="utf-8")
            recipe = load_recipe(aside)
            path = recipe.data_path
            if path is None or not path.exists():
                return []
            return sorted({row.user for row in readers.read_rows(recipe)})
        finally:
            aside.unlink(missing_ok=True)


def _import(have: str, data: Path, user: str) -> list[str]:
    return [shlex.join(["perce-lite", "import", str(data), "--user", user])] if have == "writing" else []
