"""Files of every kind that people's writing comes in: each by its ending, its content where the ending says nothing."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from perce_lite.console import progress_bar
from perce_lite.data.importers.archives import LARGEST_FILE, Found
from perce_lite.data.importers.charsets import decoded
from perce_lite.data.importers.chat_exports import chats_in, people_in, renamed, without_mojibake
from perce_lite.data.importers.chat_texts import chat_of_text
from perce_lite.data.importers.chats import Chat, answers
from perce_lite.data.importers.formatted import from_docx, from_html, from_pdf
from perce_lite.data.importers.large_json import TornJsonError, read_large
from perce_lite.data.importers.mails import Mail, read_mail, split_mbox, written_by
from perce_lite.data.importers.own_posts import SIDE_FILE, is_side_file, posts_in, posts_of_x, script_of_x
from perce_lite.data.importers.quotes import is_mail
from perce_lite.data.importers.texts import from_markdown, from_records, from_text, table
from perce_lite.data.importers.unsupported import unsupported
from perce_lite.data.importers.vaults import TEMPLATE, Vaults, without_marks
from perce_lite.data.importers.writings import Notes, Writing
from perce_lite.errors import DataError

KINDS = ".txt, .md, .docx, .html, .pdf, .csv, .tsv, .json, .jsonl, .mbox, .eml, an X archive's .js"

_UNCLEAR = "it looks like a chat or a log, and whose words it holds is not clear"


class _Table(NamedTuple):
    """Records that name no author; whether they are texts of the person's depends on what lies beside them."""

    records: Sequence[Mapping[str, Any]]
    source: str
    of_json: bool


class Reader:
    """Reads file after file; then gives what one person wrote.

    text_column: of tables
    alone: there is one file, so that what is wrong with it is the user's error and not a note
    """

    def __init__(self, notes: Notes, text_column: str | None = None, alone: bool = False) -> None:
        self.notes, self.text_column, self.alone = notes, text_column, alone
        self.texts: list[Writing] = []
        self._pending: list[Writing | _Table] = []
        self.mails: list[Mail] = []
        self.chats: list[Chat] = []
        self.dialogues: list[Chat] = []
        self.people: dict[str, tuple[str, ...]] = {}
        self.of_export = False
        self._vaults = Vaults(())
        self._of_ending: dict[str, Callable[[str, str], None]] = {
            ".txt": self._text,
            **dict.fromkeys((".md", ".markdown"), self._markdown),
            **dict.fromkeys((".csv", ".tsv"), self._table),
            **dict.fromkeys((".json", ".jsonl", ".ndjson"), self._json),
            **dict.fromkeys((".html", ".htm", ".xhtml"), self._html),
            ".js": self._script,
        }
        self._of_bytes = {".docx": from_docx, ".pdf": from_pdf}

    def read(self, files: Sequence[Found]) -> None:
        """Reads `files`, with a bar; one that cannot be read is noted and left out.

        Raises:
            DataError: a ZIP that unpacks to too much; with `alone`, a table without texts.
        """
        self._vaults = Vaults(files)
        with progress_bar() as bar:
            task = bar.add_task("Reading", total=len(files), note="")
            for file in files:
                try:
                    self._read(file)
                except OSError as error:  # rights, a broken disk; in a ZIP a password or torn bytes
                    self.notes.skip("cannot be read", f"{file.name} ({error})")
                bar.advance(task)
        for text in self._pending:
            self.texts += self._settle(text) if isinstance(text, _Table) else [text]
        self._pending.clear()

    def of(self, senders: Sequence[str], me: Sequence[str]) -> list[Writing]:
        """All that a person wrote: every text and post, the mails of `senders`, the answers of `me` in chats.

        Raises:
            DataError: it is not clear who that is, or nobody of that name wrote anything.
        """
        mails = written_by(self.mails, senders, self.notes)
        chats = renamed([*self.chats, *self._dialogues_of(me)], self.people)
        return [*self.texts, *mails, *answers(chats, me, self.notes, self.people)]

    def mask(self, mask: Callable[[str], str]) -> None:
        """Masks every text that was read, before any is cut; who wrote it stays known to `of`."""

        def masked(writing: Writing) -> Writing:
            return replace(writing, text=mask(writing.text), title=mask(writing.title), query=mask(writing.query))

        def masked_chat(chat: Chat) -> Chat:
            return replace(chat, messages=tuple(replace(message, text=mask(message.text)) for message in chat.messages))

        self.texts = list(map(masked, self.texts))
        self.mails = [mail._replace(writing=masked(mail.writing), quoted=mask(mail.quoted)) for mail in self.mails]
        self.chats, self.dialogues = list(map(masked_chat, self.chats)), list(map(masked_chat, self.dialogues))

    def _dialogues_of(self, me: Sequence[str]) -> list[Chat]:
        """The dialogues in which the person speaks; whose words the others are is not known."""
        wanted = {name.strip().casefold() for name in me}
        own_dialogues = []
        for chat in self.dialogues:
            if any(message.author.casefold() in wanted for message in chat.messages):
                self.notes.read["chats"] += 1
                own_dialogues.append(chat)
            else:
                self.notes.skip("a dialogue; say who is to be learned in it with --me NAME", chat.source)
        return own_dialogues

    def _read(self, file: Found) -> None:
        if file.left_out is not None:
            self.notes.skip(file.left_out, file.name)
        elif file.hidden:
            self.notes.skip("hidden file", file.name)
        elif self._vaults.is_template(file.name):
            self.notes.skip(TEMPLATE, file.name)
        elif PurePosixPath(file.name).name.lower() == "no-data.txt":
            self.notes.skip(SIDE_FILE, file.name)
        elif (reason := unsupported(file)) is not None:
            self.notes.skip(reason, file.name)
        elif file.ending == ".eml" or file.ending in self._of_ending or file.ending in self._of_bytes:
            self._whole(file)
        elif file.ending == ".mbox" or self._starts_as_mbox(file):
            self._mbox(file)
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
        if content is None and self._of_ending.get(file.ending) == self._json:
            self._large_json(file)
        elif content is None:
            self.notes.skip(f"larger than {LARGEST_FILE / 2**20:.0f} MiB", file.name)
        elif file.ending == ".eml":
            self._mail(content, file.name)
        elif file.ending in self._of_bytes:
            self._document(self._of_bytes[file.ending](content, file.name, self.notes))
        else:
            text = decoded(content)
            if text is None:
                self.notes.skip("binary, or text in an encoding that is not known", file.name)
            else:
                self._of_ending[file.ending](text, file.name)

    def _text(self, text: str, source: str) -> None:
        self._prose(text, source, from_text)

    def _markdown(self, text: str, source: str) -> None:
        shown = without_marks(text) if self._vaults.hold(source) else text
        self._prose(shown, source, partial(from_markdown, notes=self.notes))

    def _html(self, text: str, source: str) -> None:
        self._document(from_html(text, source, self.notes))

    def _document(self, writing: Writing | None) -> None:
        """What a DOCX, a page or a PDF says: it may be a saved chat or a mail as well as a text."""
        if writing is not None:
            self._prose(writing.text, writing.source, lambda text, source: writing)

    def _script(self, text: str, source: str) -> None:
        """A script of an X archive."""
        try:
            held = script_of_x(text)
        except ValueError as error:
            self.notes.skip("a script of an X archive that is torn", f"{source} ({error})")
            return
        if held is None:
            self.notes.skip("not a kind that is read: .js", source)
            return
        posts = posts_of_x(*held, source, self.notes)
        self.notes.read["posts and notes"] += len(posts)
        self._pending += posts

    def _prose(self, text: str, source: str, read: Callable[[str, str], Writing]) -> None:
        """A text file: a mail, a chat, a dialogue that may be one, or a text of the person's."""
        if is_mail(text):
            self._saved_mail(text, source)
            return
        dialogue = chat_of_text(text, source)
        if dialogue.unclear:
            self.notes.skip(_UNCLEAR, source)
        elif dialogue.chat is not None and dialogue.sure:
            self._chats([dialogue.chat])
        elif dialogue.chat is not None:
            self.dialogues.append(dialogue.chat)
        else:
            self.notes.read["texts"] += 1
            self._pending.append(read(text, source))

    def _saved_mail(self, text: str, source: str) -> None:
        """A mail that was saved or copied as text; its sender is read where its head is in English."""
        if re.match(r"\s*(?:[A-Za-z-]+:.*\n)*From:", text):
            self._mail(text.lstrip().encode(), source)
        else:
            self.notes.skip("a mail as text, whose sender is not surely read", source)

    def _table(self, text: str, source: str) -> None:
        try:
            records = table(text, source)
        except DataError as error:
            self._not_texts(error, source)
            return
        chats = [] if self.text_column else list(chats_in(records, source))
        if chats:
            self._chats(chats)
        else:
            self._pending.append(_Table(records, source, of_json=False))

    def _json(self, text: str, source: str) -> None:
        try:
            self._value(_whole_or_lines(text, source, self.notes), source)
        except RecursionError:
            self.notes.skip("JSON that is nested too deeply", source)

    def _large_json(self, file: Found) -> None:
        """One larger than LARGEST_FILE, piece by piece."""
        try:
            with file.open() as content:
                value = read_large(content)
        except TornJsonError as error:
            self.notes.skip("JSON that is torn; what stands ahead of that is read", f"{file.name} ({error})"[:200])
            value = error.values
        self._value(value, file.name)

    def _value(self, value: Any, source: str) -> None:
        """What a JSON file holds: people, chats, posts, or a table."""
        value = without_mojibake(value)
        people = {} if self.text_column else people_in(value)
        chats = [] if self.text_column or people else list(chats_in(value, source))
        posts = [] if self.text_column or people or chats else posts_in(value, source, self.notes)
        if people:
            self.people |= people
            self.notes.skip(SIDE_FILE, source)
        elif chats:
            self.of_export = True
            self._chats(chats)
        elif posts:
            self.of_export = True
            self.notes.read["posts and notes"] += len(posts)
            self._pending += posts
        elif is_side_file(PurePosixPath(source).name) and not self.text_column:
            self.notes.skip(SIDE_FILE, source)
        else:
            self._pending.append(_Table(_records_in(value), source, of_json=True))

    def _settle(self, tables: _Table) -> list[Writing]:
        """The texts of a table, now that it is known what it lies beside."""
        if not tables.records:
            self.notes.skip("no records in it", tables.source)
            return []
        if tables.of_json and self.of_export and not self.text_column:
            self.notes.skip(SIDE_FILE, tables.source)
            return []
        guess = self.alone or not (tables.of_json or self.chats)
        try:
            texts = list(from_records(tables.records, tables.source, self.text_column, self.notes, guess))
        except DataError as error:
            self._not_texts(error, tables.source)
            return []
        self.notes.read["rows of tables"] += len(tables.records)
        return texts

    def _chats(self, chats: Sequence[Chat]) -> None:
        self.notes.read["chats"] += len(chats)
        for chat in chats:
            for reason in chat.left_out:
                self.notes.skip(reason, chat.source)
        self.chats += [chat for chat in chats if chat.messages]

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
        return next((records for records in map(_records_in, value.values()) if records), [])
    return [record for record in value if isinstance(record, Mapping)] if isinstance(value, list) else []
