"""A piece of a person's writing, and what every reader of such needs: clean text, words, dates, notes."""

import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from typing import Any


@dataclass(frozen=True)
class Writing:
    """One piece.

    source: "mails.mbox, mail 12": where it was read
    query: what it answers, word for word; empty where nothing was asked
    date: 2024-05-31, or 2024-05-31T10:15:00 in the writer's time; None where nobody says
    kind: text, post, mail or message
    part_of: names the text that it is a part of, where one was cut into several
    """

    text: str
    source: str
    title: str = ""
    query: str = ""
    date: str | None = None
    kind: str = "text"
    part_of: str | None = None


@dataclass
class Notes:
    """What was read, by kind, and what was left out, by reason: where it stood."""

    read: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, source: str) -> None:
        """Notes that what stood at `source` was left out."""
        self.skipped.setdefault(reason, []).append(source)


_DENSE = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # Thai, Japanese, Chinese, Korean
_WORD = re.compile(rf"[{_DENSE}]|[^\s{_DENSE}]{{1,12}}")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def tidy(text: str) -> str:
    """`text` with \\n as line break, without control characters, trailing blanks and more than one empty line."""
    text = _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates, which no file in UTF-8 can hold
    text = re.sub(r"[ \t\u00a0]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def count_words(text: str) -> int:
    """Words, as a measure of tokens: a letter of a dense script counts as one, and so do 12 letters on end."""
    return sum(1 for _ in _WORD.finditer(text))


def first_words(text: str, count: int) -> str:
    """The first `count` words, spelled as they are, with ... where more follows."""
    ends = [match.end() for match in _WORD.finditer(text)]
    return text if len(ends) <= count else text[: ends[count - 1]] + " ..."


def last_words(text: str, count: int) -> str:
    """The last `count` words, with ... where more is ahead of them."""
    starts = [match.start() for match in _WORD.finditer(text)]
    return text if len(starts) <= count else "... " + text[starts[-count] :]


def pieces(text: str, limit: int, least: int = 1) -> list[str]:
    """`text` cut at empty lines into pieces of at most `limit` words; at sentences or words where it must be.

    least: words that a piece needs to stand alone; a heading or a last line that has fewer stays with a neighbour
    """
    spans = [(0, len(text))]
    for cut in (r"\n\s*\n", r"\n", r"(?<=[.!?…])\s+", r"(?<=[。！？])", r"\s+"):
        spans = [part for span in spans for part in _packed(text, span, re.compile(cut), limit)]
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and min(count_words(text[slice(*joined[-1])]), count_words(text[begin:end])) < least:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return [text[begin:end].strip() for begin, end in joined]


def _packed(text: str, span: tuple[int, int], cut: re.Pattern[str], limit: int) -> list[tuple[int, int]]:
    """The part `span` of `text` cut at some of the places where `cut` matches, as few as the limit allows."""
    if count_words(text[slice(*span)]) <= limit:
        return [span]
    cuts = [match.span() for match in cut.finditer(text, *span)]
    parts = zip([span[0], *(end for _, end in cuts)], [*(start for start, _ in cuts), span[1]], strict=True)
    packed: list[tuple[int, int, int]] = []  # begin, end, words
    for begin, end in parts:
        words = count_words(text[begin:end])
        if packed and packed[-1][2] + words <= limit:
            packed[-1] = (packed[-1][0], end, packed[-1][2] + words)
        else:
            packed.append((begin, end, words))
    return [(begin, end) for begin, end, words in packed if words]


_DAY = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?:[T ]+(\d{1,2}):(\d{2})(?::(\d{2}))?)?")
_DAY_FIRST = re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{4})(?:,? +(\d{1,2}):(\d{2})(?::(\d{2}))?)?")


def date_of(value: Any) -> str | None:
    """A date as ISO text, of a date, seconds or milliseconds since 1970, "2024-05-31 10:15", "31.5.2024" or a mail's.

    31/5/2024 and 5/31/2024 cannot be told apart in general, and are None.
    """
    if isinstance(value, date):
        return _iso(value)
    try:
        return _iso(_from_number(float(value)))
    except (TypeError, ValueError, OverflowError, OSError):
        return _from_text(value) if isinstance(value, str) else None


def _from_number(seconds: float) -> datetime:
    if seconds < 1e8:  # 1973: a year, a day of a month, a rating
        raise ValueError("not seconds since 1970")
    return datetime.fromtimestamp(seconds / 1000 if seconds > 1e11 else seconds, UTC)


def _from_text(text: str) -> str | None:
    text = text.strip()
    iso, german = _DAY.match(text), _DAY_FIRST.match(text)
    if iso is None and german is None:
        try:
            return _iso(parsedate_to_datetime(text))
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    groups = [int(group) for group in (iso or german).groups() if group]  # type: ignore[union-attr]
    if iso is None:
        groups[:3] = reversed(groups[:3])
    return numbers_to_date(groups)


def numbers_to_date(numbers: list[int]) -> str | None:
    """Year, month, day and perhaps hour, minute, second as ISO text; None where there is no such day."""
    try:
        return _iso(datetime(*numbers) if len(numbers) > 3 else date(*numbers))  # type: ignore[arg-type]
    except ValueError:
        return None


def _iso(day: date) -> str:
    """The date as it stands on the writer's clock: the zone is left out, as it orders nothing that counts here."""
    return day.replace(tzinfo=None).isoformat(timespec="seconds") if isinstance(day, datetime) else day.isoformat()
