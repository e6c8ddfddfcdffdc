"""The command `perce-lite import`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from perce_lite.cli.options import Json, writable, write
from perce_lite.console import console, say, warn
from perce_lite.data.importers.importing import FEW, Imported, Wanted, look
from perce_lite.data.importers.writings import Notes

_SHOWN = 3
_SHOWN_LETTERS = 400


def import_(
    path: Annotated[Path, typer.Argument(help="A folder, a ZIP or a file: .txt .md .csv .json .jsonl .mbox .eml")],
    user: Annotated[str, typer.Option(help="What to call the person.")],
    out: Annotated[Path, typer.Option(dir_okay=False, callback=writable, help="The file of rows to write.")] = Path(
        "texts.jsonl"
    ),
    append: Annotated[bool, typer.Option("--append", help="Add to the rows in that file.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace that file.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Write without asking.")] = False,
    text_column: Annotated[str | None, typer.Option(help="Tables: the column with the texts.")] = None,
    from_: Annotated[
        list[str] | None, typer.Option("--from", help="Mails: the person's address; once for each.")
    ] = None,
    me: Annotated[list[str] | None, typer.Option(help="Chats: the person's name in them; once for each.")] = None,
    min_words: Annotated[int, typer.Option(min=2, help="Shorter texts are left out.")] = 5,
    max_words: Annotated[int, typer.Option(min=20, help="Longer texts are cut, between paragraphs.")] = 100,
    json: Json = None,
) -> None:
    """Make rows of a person's writing; shows the first ones before it writes."""
    if append and force:
        raise typer.BadParameter("--append adds and --force replaces; give one of them")
    if not user.strip():
        raise typer.BadParameter("--user: a name that is not empty")
    wanted = Wanted(user, text_column, from_ or (), me or (), min_words, max_words)
    found = look(path, wanted, out, append, force)
    _show(found)
    written = bool(found.new) and (yes or _agreed(found))
    if written:
        found.write()
        _show_written(found)
    write(json, {**found.figures(), "written": written})


def _agreed(found: Imported) -> bool:
    """Asks whether to write. Where nobody can answer, nothing is written: a look is all that was asked for."""
    if not sys.stdin.isatty():
        say(f"Nothing was written: this was a look. To write {found.out}, add --yes.")
        return False
    agreed = typer.confirm(f"Write {len(found.new)} rows to {found.out}?", err=True)
    if not agreed:
        say("Nothing was written.")
    return agreed


def _show(found: Imported) -> None:
    """What was read and left out, and the first rows."""
    console.print(_counts(found.notes, len(found.new)))
    for record in found.new[:_SHOWN]:
        console.print(_row(record))
    if len(found.new) > _SHOWN:
        console.print(f"... and {len(found.new) - _SHOWN} more.")
    count = sum(record["user"] == found.user for record in found.records)
    if not found.new:
        say(f"Nothing is new: {found.out} holds these {count} texts already.")
    elif count == 1:
        warn(
            f"one text of {found.user}, and it takes two or more to train: a profile is made of the earlier ones. "
            f"Add more with --append."
        )
    elif count < FEW:
        warn(f"{count} texts of {found.user} are few: expect little, and hardly any to hold out")


def _counts(notes: Notes, rows: int) -> Table:
    table = Table(title="What was read", title_justify="left")
    table.add_column("")
    table.add_column("how many", justify="right")
    table.add_column("such as", overflow="fold")
    for kind, count in notes.read.items():
        table.add_row(f"read: {kind}", str(count), "")
    for reason, where in notes.skipped.items():
        table.add_row(Text(f"left out: {reason}"), str(len(where)), Text(where[0]))
    table.add_row("new rows", str(rows), "", style="bold")
    return table


def _row(record: dict[str, str]) -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name in ("source", "date", "title", "query", "text"):
        if name in record:
            value = record[name]
            table.add_row(name, Text(value if len(value) <= _SHOWN_LETTERS else value[:_SHOWN_LETTERS] + " ..."))
    return table


def _show_written(found: Imported) -> None:
    users = sorted({str(record["user"]) for record in found.records})
    told = f", of {len(users)} users" if len(users) > 1 else ""
    console.print(f"Written: {found.out} ({len(found.records)} rows{told}). Look at them, then train:", markup=False)
    _commands(found.commands())


def _commands(commands: Sequence[str]) -> None:
    for command in commands:
        console.print(command, markup=False, soft_wrap=True)
