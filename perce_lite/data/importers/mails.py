"""Mailboxes: the mails that a person wrote, without what they quoted and signed."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from email import message_from_bytes
from email.errors import HeaderParseError, MessageError
from email.header import decode_header, make_header
from email.message import Message
from email.utils import parseaddr
from html.parser import HTMLParser
from typing import Any, NamedTuple

from perce_lite.data.importers.charsets import decoded
from perce_lite.data.importers.quotes import RULE, own_words, quoted_words
from perce_lite.data.importers.writings import Notes, Writing, date_of, first_words, tidy
from perce_lite.errors import DataError

LARGEST_MAIL = 64 * 2**20
"""Bytes of a mail, attachments included."""

_ANSWERED_WORDS = 80
"""Words that a query has of the mail that was answered."""


class Mail(NamedTuple):
    """Who wrote a mail, and what is theirs in it.

    id: its Message-ID; answers: the ids of the mails that it answers, the nearest first
    quoted: what it quotes of the one that it answers; "" in a mail that answers none
    """

    address: str
    name: str
    writing: Writing
    id: str = ""
    answers: tuple[str, ...] = ()
    quoted: str = ""


_ENVELOPE = re.compile(
    rb"From .*(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun),? +(?:[A-Z][a-z]{2} +\d{1,2}|\d{1,2} +[A-Z][a-z]{2}) .*\d{1,2}:\d{2}"
)
_BARE_ENVELOPE = re.compile(rb"From (?:-|\?\?\?@\?\?\?|\S+@\S+)\s*$")
_HEADER_LINE = re.compile(rb">?[A-Za-z][!-9;-~]*:(?:[ \t]|\r?$)|>From ")


def split_mbox(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The mails of a mailbox; one longer than LARGEST_MAIL comes cut.

    A mail starts at a line with From, a sender and a date that headers follow, with or without an empty line before
    it. Not `mailbox.mbox`, which wants a path, while this one may lie in a ZIP, and takes every "From " for a mail.
    """
    mail: list[bytes] = []
    size, blank = 0, True
    for line, following in _with_next(lines):
        if _starts_mail(line, following, blank):
            if mail:
                yield b"".join(mail)
            mail, size = [], 0
        elif size < LARGEST_MAIL:
            mail.append(line[1:] if re.match(rb">+From ", line) else line)
            size += len(line)
        blank = not line.strip()
    if mail:
        yield b"".join(mail)


def _with_next(lines: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    previous: bytes | None = None
    for line in lines:
        if previous is not None:
            yield previous, line
        previous = line
    if previous is not None:
        yield previous, b""


def _starts_mail(line: bytes, following: bytes, blank: bool) -> bool:
    if not line.startswith(b"From ") or not _HEADER_LINE.match(following[:1000]):
        return False
    return bool(_ENVELOPE.match(line[:1000]) or (blank and _BARE_ENVELOPE.match(line[:1000])))


_ANSWERS, _FORWARDS = "re|aw|sv|antw", "fwd?|wg|tr"
"""What subjects of answers, and of forwarded mails, begin with."""


def read_mail(content: bytes, source: str, notes: Notes) -> Mail | None:
    """Who wrote a mail, and what is theirs in it; None, and a note, where it has no text."""
    message = message_from_bytes(content)
    name, address = parseaddr(_header(message, "From"))
    body = _body(message)
    if body is None:
        notes.skip("a mail without text", source)
        return None
    subject = _header(message, "Subject")
    title = re.sub(rf"^(({_ANSWERS}|{_FORWARDS})\s*(\[\d+\])?:\s*)+", "", subject, flags=re.I)
    date = date_of(_header(message, "Date"))
    ids = re.findall(r"<[^<>\s]+>", f"{_header(message, 'References')} {_header(message, 'In-Reply-To')}")
    is_answer = bool(ids or re.match(rf"(?:{_ANSWERS})\b", subject, re.I))
    forwards = re.match(rf"(?:{_FORWARDS})\b", subject, re.I) is not None
    return Mail(
        address.lower(),
        name,
        Writing(own_words(body), source, tidy(title), date=date, kind="mail"),
        _header(message, "Message-ID"),
        () if forwards else tuple(reversed(ids)),
        quoted_words(body) if is_answer and not forwards else "",
    )


def written_by(mails: Sequence[Mail], addresses: Sequence[str], notes: Notes) -> list[Writing]:
    """The mails from `addresses`, the query of each what it answers; all, where there is one sender and no address.

    Raises:
        DataError: several senders and no address, or an address that wrote none; names the most frequent ones.
    """
    wrote = Counter(mail.address for mail in mails)
    wanted = {address.strip().lower() for address in addresses} or (set(wrote) if len(wrote) == 1 else set())
    absent = [address for address in addresses if address.strip().lower() not in wrote]
    if absent or (mails and not wanted):
        there = ", ".join(f"{address or 'nobody'} ({count})" for address, count in wrote.most_common(10)) or "none"
        what = f"--from {absent[0]}: wrote none of these mails" if absent else "these mails are from several people"
        raise DataError(f"{what}. Say whose to take with --from ADDRESS; senders, with their mails: {there}")
    by_id = {mail.id: mail for mail in mails if mail.id}
    for mail in mails:
        if mail.address not in wanted:
            notes.skip("a mail from somebody else", mail.writing.source)
    wanted_mails = [mail for mail in mails if mail.address in wanted]
    return [replace(mail.writing, query=_answered(mail, by_id, wanted)) for mail in wanted_mails]


def _answered(mail: Mail, by_id: Mapping[str, Mail], wanted: Set[str]) -> str:
    """The beginning of the mail of another person that `mail` answers, or of what is quoted of it; "" for none."""
    answered = [by_id[id].writing.text for id in mail.answers if id in by_id and by_id[id].address not in wanted]
    return first_words(next(filter(None, [*answered[:1], mail.quoted]), ""), _ANSWERED_WORDS)


def _header(message: Message, name: str) -> str:
    """A header, its encoded words decoded; as it stands where they are broken."""
    value = str(message.get(name, ""))
    try:
        return " ".join(str(make_header(decode_header(value))).split())
    except (HeaderParseError, LookupError, ValueError, MessageError):
        return " ".join(value.split())


def _body(message: Message) -> str | None:
    """The plain text of a mail, all its parts; of its HTML where it has none."""
    plain: list[str] = []
    html: list[str] = []
    for part in _shown(message):
        text = _decoded(part)
        if part.get_content_subtype() == "html":
            html.append(plain_text(text))
        else:
            flowed = str(part.get_param("format", "")).lower() == "flowed"
            plain.append(_unflowed(text) if flowed else text)
    texts = [text for text in plain if text.strip()] or [text for text in html if text.strip()]
    return "\n\n".join(texts) or None


def _shown(part: Message) -> Iterator[Message]:
    """The parts that are text; not `walk`, which goes into attached mails as well: those are somebody else's."""
    if part.get_content_disposition() == "attachment" or part.get_content_maintype() == "message":
        return
    if part.is_multipart():
        inside: Any = part.get_payload()
        for subpart in inside:
            yield from _shown(subpart)
    elif part.get_content_type() in ("text/plain", "text/html"):
        yield part


def _decoded(part: Message) -> str:
    content: Any = part.get_payload(decode=True)
    try:
        return content.decode(part.get_content_charset("utf-8"))
    except (LookupError, ValueError):  # a charset that is a lie, or unknown
        return decoded(content) or content.decode("ascii", "replace")


def _unflowed(text: str) -> str:
    """Lines that end with a space go on in the next one (RFC 3676); "-- " and quotes do not."""
    return re.sub(r"(?m)^(?!>)(?!-- \r?$)(.*) \r?\n(?![>\s]|-- )", r"\1 ", text)


class _Plain(HTMLParser):
    """Collects the text that a reader sees, less what is quoted."""

    _UNSEEN = ("script", "style", "title", "blockquote")
    _QUOTES = re.compile(
        r"(?i)gmail_quote|yahoo_quoted|protonmail_quote|tutanota_quote|zmail_extra|moz-cite-prefix|moz-forward-container|"
        r"moz-signature|gmail_signature|reply-intro|mail-editor-reference-message-container|__QUOTED_TEXT__|__HEADERS__|"
        r"^quote$|mail-quote-collapse|ms-outlook-mobile-reference-message|AppleMailSignature|ydp\w+yahoo_quoted"
    )
    _ENDS = re.compile(r"divRplyFwdMsg|appendonsend|^zwchr$|OutlookMessageHeader|stopSpelling")
    _VOID = ("br", "hr", "img", "input", "meta", "link")
    _BLOCKS = ("p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "ul", "ol", "table", "hr")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text: list[str] = []
        self.open: list[str] = []  # elements that are not shown, the outermost first

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        marks = [value for name, value in attrs if value and name in ("class", "id", "name", "data-marker")]
        quoted = any(map(self._QUOTES.search, marks)) and tag not in self._VOID
        if not self.open and any(map(self._ENDS.search, marks)):
            self.text.append(f"\n{RULE}\n")  # what follows is the mail that is answered
        if (self.open and tag == self.open[0]) or (not self.open and (tag in self._UNSEEN or quoted)):
            self.open.append(tag)
        elif tag in self._BLOCKS and not self.open:
            self.text.append("\n\n" if tag in ("p", "table", "ul", "ol") else "\n")

    def handle_endtag(self, tag: str) -> None:
        if self.open and tag == self.open[0]:
            self.open.pop()
        elif tag in ("p", "table", "ul", "ol") and not self.open:
            self.text.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.open:
            self.text.append(re.sub(r"\s+", " ", data))


def plain_text(html: str) -> str:
    """What a reader of `html` sees, as plain text; quotes (blockquote, Gmail's) are left out."""
    parser = _Plain()
    parser.feed(re.sub(r"<!\[[^>]*>?", "", html))  # Word's <![if ...]>, of which the parser knows but a few
    parser.close()
    return tidy(re.sub(r" *\n *", "\n", "".join(parser.text)))
