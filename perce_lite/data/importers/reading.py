"""Files of every kind that people's writing comes in: each by its ending, its content where the ending says nothing."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from perce_lite.console import progress_bar
from perce_lite.data.importers.archives import LARGEST_FILE, Found
from perce_lite.data.importers.charsets import decoded
from perce_lite.data.importers.chats import Chat, answers, chats_in, whatsapp
from perce_lite.data.importers.mails import Mail, read_mail, split_mbox, written_by
from perce_lite.data.importers.texts import from_markdown, from_records, from_text, table
from perce_lite.data.importers.writings import Notes, Writing
from perce_lite.errors import DataError

KINDS = ".txt, .md, .csv, .tsv, .json, .jsonl, .mbox, .eml"


class Reader:
    """Reads file after file; then gives what one person wrote.

    text_column: of tables
    alone: there is one file, so that what is wrong with it is the user's error and not a note
    """

    def __init__(self, notes: Notes, text_column: str | None = None, alone: bool = False) -> None:
        self.notes, self.text_column, self.alone = notes, text_column, alone
        self.texts: list[Writing] = []
        self.mails: list[Mail] = []
        self.chats: list[Chat] = []
        self._of_ending: dict[str, Callable[[str, str], None]] = {
            ".txt": self._text,
            **dict.fromkeys((".md", ".markdown"), self._markdown),
            **dict.fromkeys((".csv", ".tsv"), self._table),
            **dict.fromkeys((".json", ".jsonl", ".ndjson"), self._json),
        }

    def read(self, files: Sequence[Found]) -> None:
        """Reads `files`, with a bar; one that cannot be read is noted and left out.

        Raises:
            DataError: a ZIP that unpacks to too much; with `alone`, a table without texts.
        """
        with progress_bar() as bar:
            task = bar.add_task("Reading", total=len(files), note="")
            for file in files:
                try:
                    self._read(file)
                except OSError as error:  # rights, a broken disk; in a ZIP a password or torn bytes
                    self.notes.skip("cannot be read", f"{file.name} ({error})")
                bar.advance(task)

    def of(self, senders: Sequence[str], me: Sequence[str]) -> list[Writing]:
        """All that a person wrote: every text and post, the mails of `senders`, the answers of `me` in chats.

        Raises:
            DataError: it is not clear who that is, or nobody of that name wrote anything.
        """
        mails = written_by(self.mails, senders, self.notes)
        return [*self.texts, *mails, *answers(self.chats, me, self.notes)]

    def _read(self, file: Found) -> None:
        if file.hidden:
            self.notes.skip("hidden file", file.name)
        elif file.ending == ".mbox" or (file.ending not in {*self._of_ending, ".eml"} and self._starts_as_mbox(file)):
            self._mbox(file)
        elif file.ending == ".eml" or file.ending in self._of_ending:
            self._whole(file)
        else:
            self.notes.skip(f"not a kind that is read: {file.ending or 'no ending'}", file.name)

    def _starts_as_mbox(self, file: Found) -> bool:
        return file.head().startswith(b"From ")  # Thunderbird's and Apple's mailboxes have no ending

    def _mbox(self, file: Found) -> None:
        with file.open() as lines:
            for number, content in enumerate(split_mbox(lines), 1):
                self._mail(content, f"{file.name}, mail {number}")

    def _mail(self, content: bytes, source: str) -> None:
        self.notes.read["mails"] += 1
        try:
            mail = read_mail(content, source, self.notes)
        except RecursionError:
            self.notes.skip("a mail that is nested too deeply", source)
            return
        if mail is not None:
            self.mails.append(mail)

    def _whole(self, file: Found) -> None:
        content = file.content()
        if content is None:
            self.notes.skip(f"larger than {LARGEST_FILE / 2**20:.0f} MiB", file.name)
        elif file.ending == ".eml":
            self._mail(content, file.name)
        else:
            text = decoded(content)
            if text is None:
                self.notes.skip("binary, or text in an encoding that is not known", file.name)
            else:
                self._of_ending[file.ending](text, file.name)

    def _text(self, text: str, source: str) -> None:
        chat = whatsapp(text, source)
        if chat is not None:
            self._chats([chat])
        else:
            self.notes.read["texts"] += 1
            self.texts.append(from_text(text, source))

    def _markdown(self, text: str, source: str) -> None:
        self.notes.read["texts"] += 1
        self.texts.append(from_markdown(text, source))

    def _table(self, text: str, source: str) -> None:
        try:
            self._records(table(text, source), source)
        except DataError as error:
            self._not_texts(error, source)

    def _json(self, text: str, source: str) -> None:
        try:
            value = _whole_or_lines(text, source, self.notes)
            chats = [] if self.text_column else list(chats_in(value, source))
            if chats:
                self._chats(chats)
            else:
                self._records(_records_in(value), source)
        except RecursionError:
            self.notes.skip("JSON that is nested too deeply", source)
        except DataError as error:
            self._not_texts(error, source)

    def _records(self, records: Sequence[Mapping[str, Any]], source: str) -> None:
        chats = [] if self.text_column else list(chats_in(records, source))
        if chats:
            self._chats(chats)
        elif records:
            self.texts += from_records(records, source, self.text_column, self.notes)
            self.notes.read["rows of tables"] += len(records)
        else:
            self.notes.skip("no records in it", source)

    def _chats(self, chats: Sequence[Chat]) -> None:
        self.notes.read["chats"] += len(chats)
        self.chats += chats

    def _not_texts(self, error: DataError, source: str) -> None:
        if self.alone:
            raise error
        self.notes.skip("a table in which no column looks like texts", source)


def _whole_or_lines(text: str, source: str, notes: Notes) -> Any:
    """The JSON value of a file, or a list of those in its lines; lines that are none are noted."""
    try:
        return json.loads(text)
    except ValueError:
        values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError:
                notes.skip("not JSON", f"{source}, line {number}")
    return values


def _records_in(value: Any) -> list[Mapping[str, Any]]:
    """The records of a JSON value: those of a list, or of the first list in an object that has any."""
    if isinstance(value, Mapping):
        return next((found for found in map(_records_in, value.values()) if found), [])
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
