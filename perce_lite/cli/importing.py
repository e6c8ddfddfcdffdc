"""The command `perce-lite import`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from perce_lite.cli.options import Json, writable, write
from perce_lite.console import console, say, warn
from perce_lite.data.importers.importing import FEW, Imported, Wanted, look
from perce_lite.data.importers.masking import REGIONS, Mask, checked_regions, names_in, placeholder
from perce_lite.data.importers.writings import Notes
from perce_lite.words import counted

_SHOWN = 3
_SHOWN_LETTERS = 400


def import_(
    path: Annotated[
        Path, typer.Argument(help="A folder, a ZIP or a file: .txt .md .docx .html .pdf .csv .json .mbox .eml ...")
    ],
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
    max_parts: Annotated[int, typer.Option(min=1, help="Of a longer text at most so many parts are taken.")] = 10,
    mask: Annotated[
        bool,
        typer.Option(
            "--mask",
            help="Mask mail addresses, phones, IBANs, cards, links, street numbers and secrets; see what first.",
        ),
    ] = False,
    mask_names: Annotated[
        Path | None, typer.Option(dir_okay=False, help="--mask: names to mask as well, one a line in this file.")
    ] = None,
    mask_region: Annotated[
        list[str] | None, typer.Option(help=f"--mask: countries of phones without a code; else {' '.join(REGIONS)}.")
    ] = None,
    json: Json = None,
) -> None:
    """Make rows of a person's writing; shows the first ones before it writes."""
    if append and force:
        raise typer.BadParameter("--append adds and --force replaces; give one of them")
    if not user.strip():
        raise typer.BadParameter("--user: a name that is not empty")
    if not mask and (mask_names or mask_region):
        raise typer.BadParameter("--mask-names and --mask-region go with --mask")
    masking = _mask(mask_names, mask_region) if mask else None
    wanted = Wanted(user, text_column, from_ or (), me or (), min_words, max_words, max_parts, masking)
    imported = look(path, wanted, out, append, force)
    _show(imported)
    written = bool(imported.new) and (yes or _agreed(imported))
    if written:
        imported.write()
        _show_written(imported)
    write(json, {**imported.figures(), "written": written})


def _mask(names: Path | None, regions: Sequence[str] | None) -> Mask:
    return Mask(names_in(names) if names else (), checked_regions(regions) if regions else REGIONS)


def _agreed(imported: Imported) -> bool:
    """Asks whether to write. Where nobody can answer, nothing is written: a look is all that was asked for."""
    if not sys.stdin.isatty():
        say(f"Nothing was written: this was a look. To write {imported.out}, add --yes.")
        return False
    agreed = typer.confirm(f"Write {counted(len(imported.new), 'row')} to {imported.out}?", err=True)
    if not agreed:
        say("Nothing was written.")
    return agreed


def _show(imported: Imported) -> None:
    """What was read and left out, and the first rows."""
    console.print(_counts(imported.notes, len(imported.new)))
    if imported.mask is not None:
        console.print(_masked(imported.mask, imported.masked()))
    for record in imported.new[:_SHOWN]:
        console.print(_row(record))
    if len(imported.new) > _SHOWN:
        console.print(f"... and {len(imported.new) - _SHOWN} more.")
    count = sum(record["user"] == imported.user for record in imported.records)
    if not imported.new:
        say(f"Nothing is new: {imported.out} holds {counted(count, 'text')} of {imported.user} already.")
    elif imported.texts == 1:
        parts = f" (in {count} parts, none of which stands in the profile of another)" if count > 1 else ""
        warn(
            f"one text of {imported.user}{parts}, and it takes two or more to train: a profile is made of the earlier "
            f"ones. Add more with --append."
        )
    elif count < FEW:
        warn(f"{count} texts of {imported.user} are few: expect little, and hardly any to hold out")


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


def _masked(mask: Mask, counts: Mapping[str, int]) -> Table:
    """How often each kind is masked in the new rows, and the first thing that was."""
    table = Table(title="What is masked" if counts else "What is masked: nothing was found", title_justify="left")
    table.add_column("")
    table.add_column("how many", justify="right")
    table.add_column("such as", overflow="fold")
    for kind, count in counts.items():
        table.add_row(Text(placeholder(kind)), str(count), Text(mask.first.get(kind, "")))
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


def _show_written(imported: Imported) -> None:
    users = sorted({str(record["user"]) for record in imported.records})
    suffix = f", of {counted(len(users), 'user')}" if len(users) > 1 else ""
    console.print(
        f"Written: {imported.out} ({counted(len(imported.records), 'row')}{suffix}). "
        "Look at them, train, talk to the adapter:",
        markup=False,
    )
    _commands(imported.commands())


def _commands(commands: Sequence[str]) -> None:
    for command in commands:
        console.print(command, markup=False, soft_wrap=True)
