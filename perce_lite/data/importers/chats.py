"""Chats: the exports of messengers and of assistants become turns, and a person's answers become writings."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from perce_lite.data.importers.writings import Notes, Writing, date_of, last_words, numbers_to_date, tidy
from perce_lite.errors import DataError

AUTHORS = (
    "from", "author", "sender", "sender_name", "username", "user", "name", "role", "speaker", "authorname",
)  # fmt: skip
TEXTS = ("text", "content", "message", "body", "value", "contents")
DATES = ("date", "create_time", "created_at", "timestamp", "timestamp_ms", "time", "ts", "datetime", "created")
"""Fields of a message, as exports call them."""

QUERY_WORDS = 40
"""Words of what was said before that stand in a query: an answer leans on the end of it."""

_ASSISTANTS = {"assistant", "system", "tool", "model", "ai", "bot", "gpt", "chatgpt", "claude", "function", "developer"}
_PEOPLE = {"user", "human"}
_PAUSE = timedelta(hours=1)


@dataclass(frozen=True)
class Message:
    """One message of a chat; `date` as in `Writing`."""

    author: str
    text: str
    date: str | None = None


@dataclass(frozen=True)
class Chat:
    """A chat, its messages in the order of time."""

    source: str
    messages: tuple[Message, ...]


def chats_in(node: Any, source: str, depth: int = 0) -> Iterator[Chat]:
    """Every chat in `node`, an export read from JSON: wherever there is a list of messages of two people or more."""
    if depth > 8:
        return
    if isinstance(node, Mapping) and isinstance(node.get("mapping"), Mapping):
        node = list(_branch(node))
    if isinstance(node, list) and node:
        messages = [one for one in map(message_of, node) if one is not None]
        if len({message.author for message in messages}) > 1:
            if all(one.date for one in messages):
                messages.sort(key=lambda one: one.date or "")  # some exports have the newest first
            yield Chat(source, tuple(messages))
            return
    inner = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    for one in inner:
        yield from chats_in(one, source, depth + 1)


def _branch(conversation: Mapping[str, Any]) -> Iterator[Any]:
    """ChatGPT's tree of messages: the branch that was left standing, from its root on."""
    tree = conversation["mapping"]
    parents = [one.get("parent") for one in tree.values() if isinstance(one, Mapping)]
    leaf = conversation.get("current_node") or next((name for name in reversed(tree) if name not in parents), None)
    path: list[Any] = []
    while (
        isinstance(leaf, str) and isinstance(tree.get(leaf), Mapping) and len(path) <= len(tree)
    ):  # a broken export may turn in a circle
        path.append(tree[leaf].get("message"))
        leaf = tree[leaf].get("parent")
    return reversed(path)


def message_of(record: Any) -> Message | None:
    """The message that a record of an export is; None where it has no author or no text."""
    if not isinstance(record, Mapping):
        return None
    named = {str(name).lower(): value for name, value in record.items()}
    author = next((_name(named[key]) for key in AUTHORS if named.get(key)), "")
    text = next((flat(named[key]) for key in TEXTS if named.get(key)), "")
    date = next((date_of(named[key]) for key in DATES if named.get(key)), None)
    return Message(author, tidy(text), date) if author and text.strip() else None


def _name(value: Any) -> str:
    if isinstance(value, Mapping):  # {"role": "user"}, {"username": "ann"}
        value = next((value[key] for key in ("name", "username", "login", "role", "id") if value.get(key)), "")
    return tidy(str(value)) if isinstance(value, str | int) else ""


def flat(value: Any) -> str:
    """The text of a message: a text, a list of texts and of {text} as Telegram's, or {parts} as ChatGPT's."""
    if isinstance(value, Mapping):
        return flat(value.get("parts") or value.get("text") or "")
    if isinstance(value, list):
        return "".join(flat(one) for one in value)
    return value if isinstance(value, str) else ""


_LINE = re.compile(
    r"^\[?(?P<date>\d{1,4}[./-]\d{1,2}[./-]\d{1,4}),? (?P<hour>\d{1,2})[:.](?P<minute>\d{2})(?::(?P<second>\d{2}))?"
    r"(?:\s?(?P<half>[AaPp])\.?\s?[Mm]\.?)?\]?(?: [-–])? (?P<said>.*)$"
)
_MEDIA = re.compile(
    r"^<.*(media|medien|médias|multimedia|omitted).*>$|^(image|video|audio|sticker|gif|document|contact card) omitted$|"
    r"^(this message was deleted|you deleted this message)\.?$|\(file attached\)$",
    re.I,
)


def whatsapp(text: str, source: str) -> Chat | None:
    """The chat of a WhatsApp text export (12/31/20, 10:15 - Ann: Hello); None where `text` is something else."""
    lines = tidy(text).replace("\u202f", " ").split("\n")
    found = [_LINE.match(line) for line in lines]
    if found[0] is None or sum(": " in one["said"] for one in found if one) < 2:
        return None
    order = _order([one["date"] for one in found if one])
    messages: list[Message] = []
    system = False  # "Messages are end-to-end encrypted": nobody says it, nor what follows it
    for line, start in zip(lines, found, strict=True):
        if start is None:
            if messages and not system:
                messages[-1] = replace(messages[-1], text=f"{messages[-1].text}\n{line}")
            continue
        author, colon, said = start["said"].partition(": ")
        system = not colon
        if colon:
            messages.append(Message(author.strip(), said, _when(start, order)))
    kept = [
        replace(message, text=message.text.strip()) for message in messages if not _MEDIA.search(message.text.strip())
    ]
    return Chat(source, tuple(one for one in kept if one.text))


def _numbers(date: str, order: str) -> list[int]:
    """Year, month, day of a date such as 31.12.20, whose numbers stand in `order`."""
    by = dict(zip(order, map(int, re.split(r"[./-]", date)), strict=True))
    return [by["y"] + (2000 if by["y"] < 100 else 0), by["m"], by["d"]]


def _order(dates: Sequence[str]) -> str:
    """ymd, dmy or mdy: the one in which all dates exist and time does not run backwards; a chat is in its order."""
    if len(re.split(r"[./-]", dates[0])[0]) == 4:
        return "ymd"
    orders = ("mdy", "dmy") if "/" in dates[0] else ("dmy", "mdy")

    def faults(order: str) -> int:
        days = [_numbers(date, order) for date in dates]
        backwards = sum(later < earlier for earlier, later in pairwise(days))
        return backwards + len(days) * sum(numbers_to_date(day) is None for day in days)

    return min(orders, key=faults)


def _when(start: re.Match[str], order: str) -> str | None:
    hour = int(start["hour"])
    if start["half"]:
        hour = hour % 12 + (12 if start["half"] in "pP" else 0)
    return numbers_to_date([*_numbers(start["date"], order), hour, int(start["minute"]), int(start["second"] or 0)])


def answers(chats: Sequence[Chat], me: Sequence[str], notes: Notes) -> list[Writing]:
    """What one person wrote in the chats: each turn of theirs, its query what the others said since their last one.

    me: their names; in chats with an assistant it need not be given

    Raises:
        DataError: nobody of that name, or several people and no name; says who is there.
    """
    mine = _mine(chats, me)
    written = []
    for chat in chats:
        if not any(message.author.lower() in mine for message in chat.messages):
            notes.skip("a chat without a message of the person", chat.source)
        before: list[Message] = []
        for number, turn in enumerate(turns(chat.messages), 1):
            if turn.author.lower() in mine:
                where = f"{chat.source}, turn {number}"
                written.append(Writing(turn.text, where, query=_said(before), date=turn.date, kind="message"))
                before = []
            else:
                before.append(turn)
    return written


def _mine(chats: Sequence[Chat], me: Sequence[str]) -> set[str]:
    wrote = Counter(message.author for chat in chats for message in chat.messages)
    authors = {author.lower() for author in wrote}
    wanted = {name.strip().lower() for name in me}
    if not wanted and authors & _PEOPLE and authors <= _PEOPLE | _ASSISTANTS:
        return _PEOPLE
    absent = [name for name in me if name.strip().lower() not in authors]
    if absent or (chats and not wanted):
        there = ", ".join(f"{author} ({count})" for author, count in wrote.most_common(10)) or "nobody"
        what = f"--me {absent[0]}: wrote nothing in these chats" if absent else "these chats are of several people"
        raise DataError(f"{what}. Say who is to be learned with --me NAME; in them, with their messages: {there}")
    return wanted


def turns(messages: Sequence[Message]) -> list[Message]:
    """The messages, with those that one person sent in a row, within an hour of each other, made one."""
    joined: list[Message] = []
    last: Message | None = None
    for message in messages:
        if last is not None and last.author == message.author and _soon(last, message):
            joined[-1] = replace(joined[-1], text=f"{joined[-1].text}\n{message.text}")
        else:
            joined.append(message)
        last = message
    return joined


def _soon(earlier: Message, later: Message) -> bool:
    if earlier.date is None or later.date is None:
        return True
    return datetime.fromisoformat(later.date) - datetime.fromisoformat(earlier.date) <= _PAUSE


def _said(before: Sequence[Message]) -> str:
    """The end of what others said, with names where several spoke."""
    several = len({turn.author for turn in before}) > 1
    return last_words(
        "\n".join(f"{turn.author}: {turn.text}" if several else turn.text for turn in before), QUERY_WORDS
    )
