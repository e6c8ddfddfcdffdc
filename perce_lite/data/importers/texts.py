"""Plain text, Markdown and tables: one piece of writing a file, or one a row."""

import csv
import io
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from perce_lite.data.importers.chat_exports import DATES, TEXTS, flat
from perce_lite.data.importers.writings import Notes, Writing, count_words, date_of, tidy
from perce_lite.errors import DataError

_TITLES = ("title", "subject", "headline", "heading", "topic")
_QUERIES = ("query", "prompt", "question", "instruction")
_TABLE_TEXTS = (*TEXTS, "full_text", "post", "tweet", "comment", "article", "review", "reviewtext", "abstract", "note")
_TABLE_DATES = (*DATES, "day", "published", "published_at", "posted", "sent")
_PROSE = 4
"""Words that a column's cells have on average, if it is one of texts."""


def from_text(text: str, source: str) -> Writing:
    """A text file. It has no title: a file's name is more often "notes 2 final" than what the text is about."""
    return Writing(tidy(text), source, date=_date_in(source))


def from_markdown(text: str, source: str, notes: Notes | None = None) -> Writing:
    """A Markdown file: title and date of its front matter, else its first heading and a date in the file's name.

    Front matter that is broken is no part of the text: it is noted, and its title and date are read line by line.
    """
    body, front, sound = _front_matter(tidy(text))
    if notes is not None and not sound:
        notes.skip("front matter that is broken, of which title and date alone are read", source)
    title = tidy(str(front.get("title") or ""))  # YAML may write a control as letters
    heading = re.match(r"\s*#\s+([^\n]+?)\s*#*\s*(?:\n|\Z)", body)
    if heading and title in ("", heading[1]):
        title, body = heading[1], body[heading.end() :]
    return Writing(body.strip(), source, title, date=date_of(front.get("date")) or _date_in(source))


_FRONT = re.compile(r"(---|\+\+\+)[ \t]*\n(.*?)\n(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", re.S)
_UNENDED_FRONT = re.compile(r"(---|\+\+\+)[ \t]*\n((?:[\w-]+[ \t]*[:=](?:[ \t].*)?\n|[ \t]+.*\n|- .*\n)+)(?:\n|\Z)")
_FIELD = re.compile(r"(?m)^([\w-]+)[ \t]*[:=][ \t]*[\"']?(.*?)[\"']?[ \t]*$")


def _front_matter(text: str) -> tuple[str, dict[str, Any], bool]:
    """The text below a head between two lines of --- (YAML) or +++ (TOML), what the head says, and if it is sound."""
    front = _FRONT.match(text)
    if front is None or (front[1] == "---" and not re.search(r"(?m)^[\w-]+[ \t]*:", front[2])):
        unended = _UNENDED_FRONT.match(text)
        if unended is None:  # a rule at the top of a text
            return text, {}, True
        return text[unended.end() :], dict(_FIELD.findall(unended[2])), False
    try:
        # base: every value as it is written, dates too
        head = YAML(typ="base", pure=True).load(front[2]) if front[1] == "---" else tomllib.loads(front[2])
    except (YAMLError, tomllib.TOMLDecodeError):
        head = None
    if isinstance(head, dict):
        return text[front.end() :], head, True
    return text[front.end() :], dict(_FIELD.findall(front[2])), False


def _date_in(source: str) -> str | None:
    """2024-05-31 of "posts/2024-05-31-rain.md". A file's time of change is no date: a copy has a new one."""
    match = re.search(r"(?<!\d)\d{4}-\d{2}-\d{2}(?!\d)", PurePosixPath(source).name)
    return date_of(match[0]) if match else None


def table(text: str, source: str) -> list[dict[str, Any]]:
    """The rows of a CSV by the names in its first line; comma, semicolon, tab or bar stand between columns.

    Raises:
        DataError: a first line that names no columns.
    """
    first = text.lstrip("\n").partition("\n")[0]
    between = max(",;\t|", key=lambda separator: first.count(separator))
    csv.field_size_limit(2**26)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=between, restkey=""))
    except csv.Error as error:
        raise DataError(f"{source}: not a CSV that can be read: {error}") from error
    names = [name for name in (rows[0] if rows else {}) if name]
    if rows and (not names or any(count_words(name) > 8 or _is_value(name) for name in names)):
        raise DataError(f"{source}: the first line of a CSV names its columns; this one is {first[:60]!r}")
    return [{name: value for name, value in row.items() if name and isinstance(value, str)} for row in rows]


def _is_value(name: str) -> bool:
    """Whether a column's name is a date, a time or a number: then the first line is a row like the others."""
    return re.fullmatch(r"[\d\s.,:/+-]*\d[\d\s.,:/+-]*", name) is not None or date_of(name) is not None


def from_records(
    records: Sequence[Mapping[str, Any]], source: str, text_column: str | None, notes: Notes, guess: bool = True
) -> Iterator[Writing]:
    """One piece of writing a record; query, title and date from columns that are called so.

    text_column: the one with the texts; else it is known by its name, or, with `guess`, by having the longest cells

    Raises:
        DataError: no such column, or none that holds texts; names those there are.
    """
    names = list(Counter(str(name) for record in records for name in record))
    text = _text_column(records, names, source, text_column, guess)
    rest = [name for name in names if name != text]
    title, query, date = (_called(rest, known) for known in (_TITLES, _QUERIES, _TABLE_DATES))
    for number, record in enumerate(records, 1):
        where = f"{source}, row {number}"
        body = tidy(flat(record.get(text)))
        if not body:
            notes.skip("empty", where)
            continue
        yield Writing(
            body,
            where,
            tidy(flat(record.get(title))) if title else "",
            tidy(flat(record.get(query))) if query else "",
            date_of(record.get(date)) if date else None,
            "post",
        )


def _called(names: Sequence[str], known: Sequence[str]) -> str | None:
    """The one of `names` that is `known`, the best known first."""
    of = {name.strip().lower(): name for name in reversed(names)}
    return next((of[name] for name in known if name in of), None)


def _text_column(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], source: str, given: str | None, guess: bool
) -> str:
    message = f"{source}: its columns are {', '.join(names[:20]) or 'none'}"
    if given is not None:
        if given not in names:
            raise DataError(f"{message}; --text-column {given} is none of them")
        return given
    named = _called(names, _TABLE_TEXTS)
    words = {name: sum(count_words(flat(record.get(name))) for record in records) / len(records) for name in names}
    untitled = [name for name in names if guess and name.strip().lower() not in (*_TITLES, *_QUERIES)]
    longest = max(untitled, key=lambda name: words[name], default=None)
    if named is not None and words[named] >= _PROSE:
        return named
    if longest is None or words[longest] < _PROSE:
        raise DataError(f"{message}; none of them looks like texts. Say which it is with --text-column NAME")
    return longest
